"""Converts checkpoints: released NaViL <-> model folder of this package, and text LLM -> model folder.

A tensor goes through four stops:

    names.py   which tensors make which: a `Rule` has names, shapes and the arithmetic between them
    plan.py    configs, tokenizers and file headers are read; a `Plan` lists all that will be written
    read.py    source tensors, one at a time
    write.py   safetensors files and everything else in the new folder

`configs.py` and `tokenizers.py` convert what is not a tensor, `files.py` has JSON, checksums and folders, `hub.py`
pushes a folder, and `verify.py` checks one, with `loading.py` in a fresh process. The layouts are described in
docs/conversion.md.
"""
