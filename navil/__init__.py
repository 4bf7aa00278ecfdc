"""The `*_navil.py` modules as a package: `from navil import draw_boxes, modeling_navil`.

The Hub wants the modules at the top level of a model repository, so this package finds them there.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE_FILES = tuple(sorted(path.name for path in ROOT.glob("*_navil.py")))
"""The code that a model folder carries with it."""

__path__.append(str(ROOT))

from .processing_navil import LabeledBox, draw_boxes  # noqa: E402, F401
