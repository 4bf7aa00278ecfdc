"""The modules of this package, loaded as transformers loads remote code: what they define saves and loads as such."""

import sys
from pathlib import Path
from types import ModuleType

from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent
CODE_FILES = tuple(sorted(path.name for path in ROOT.glob("*_navil.py")))
"""The code that a model folder carries with it."""


def navil_module(name: str, class_name: str) -> ModuleType:
    """The module of this package with that name, which defines that class."""
    return sys.modules[get_class_from_dynamic_module(f"{name}.{class_name}", str(ROOT)).__module__]


configuration = navil_module("configuration_navil", "NaViLConfig")
tokenization = navil_module("tokenization_navil", "NaViLTokenizer")
image_processing = navil_module("image_processing_navil", "NaViLImageProcessor")
processing = navil_module("processing_navil", "NaViLProcessor")
modeling = navil_module("modeling_navil", "NaViLForConditionalGeneration")
