"""Coverage-guided fuzzing of the property-based tests' entry points, by atheris (`pip install atheris`).

    python tests/coverage_fuzz.py images -max_total_time=600 -len_control=0
    python tests/coverage_fuzz.py slots -max_total_time=600 -len_control=0

Arguments after the target's name go to atheris and libFuzzer. Any error but a ValueError stops the run.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["navil", "PIL"]):
    import conftest  # noqa: F401
    from hypothesis import given
    from hypothesis import strategies as st

    from navil.image_processing_navil import NaViLImageProcessor
    from navil.tokenization_navil import expand_image_slots

from fuzzing import damaged_files, fuzz, texts

DAMAGED = Path(tempfile.mkdtemp(prefix="navil-fuzz-")) / "damaged"


@fuzz
@given(data=damaged_files())
def images(data):
    DAMAGED.write_bytes(data)
    try:
        NaViLImageProcessor(min_pixels=256, max_pixels=4096)(DAMAGED, multi_scale=True)
    except ValueError:
        pass


numbers = st.integers(-1, 6)


@fuzz
@given(
    prompts=st.lists(st.one_of(texts, st.just("<image>")), max_size=4),
    scales=st.lists(st.lists(st.tuples(numbers, numbers), max_size=3), max_size=4),
)
def slots(prompts, scales):
    try:
        expanded = expand_image_slots(prompts, scales, 2)
    except ValueError:
        return
    assert sum(text.count("<img>") for text in expanded) == len(scales)


def main() -> None:
    warnings.simplefilter("ignore")
    targets = {"images": images, "slots": slots}
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, targets[name].hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
