"""Draws where a NaViL looks: its attention layer by layer, and each answer token's attention on the picture.

python examples/attention_maps.py                          # the checkpoint in tiny/ about examples/shapes.png
python examples/attention_maps.py --image examples/box.png --question "Where is the green circle?"
python examples/attention_maps.py --model weights/navil-2b --image photo.jpg --question "What is it?" --layers 0 11 23

layers.png is the paper's Figure 9 for one question: rows look at columns, text tokens are marked blue and image tokens
green. answer.png lays the attention from which each answer token was generated over the picture, all scales together.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModel, AutoProcessor

ROOT = Path(__file__).resolve().parent.parent
TEXT_COLOR, IMAGE_COLOR = (0.12, 0.47, 0.71), (0.17, 0.63, 0.17)
MAX_PANELS = 6
OPACITY = 0.65  # of the attention over the picture


@dataclass
class AttentionMaps:
    """Attention over a question about a picture and its answer, L tokens, averaged over the heads of a layer."""

    weights: np.ndarray  # (layers, L, L), rows look at columns
    is_image: np.ndarray  # (L,) bool, the tokens of the visual experts
    answer: list[str]  # the last of the L tokens
    places: list[np.ndarray]  # (rows, columns) of merged cells per scale: which of the L tokens a cell is
    sizes: list[tuple[int, int]]  # height and width of each scale, in pixels without padding
    cell: int  # side of a merged cell, in pixels

    def share_on_image(self) -> np.ndarray:
        """(layers,) how much of their attention the answer's tokens give to image tokens."""
        return self.weights[:, -len(self.answer) - 1 : -1][..., self.is_image].sum(-1).mean(-1)

    def heat(self, answer_token: int, height: int, width: int) -> np.ndarray:
        """(height, width) attention per pixel of the picture, mean of the layers and sum of the scales.

        It is that of the position from which the answer token was generated, the one before it.
        """
        position = self.weights.shape[1] - len(self.answer) + answer_token - 1
        looks = self.weights[:, position].mean(0)  # (L,)
        heat = np.zeros((height, width))
        for places, size in zip(self.places, self.sizes, strict=True):
            zoom_y, zoom_x = size[0] / height, size[1] / width  # pixels of the scale per pixel of the picture
            rows = ((np.arange(height) + 0.5) * zoom_y // self.cell).astype(int)
            columns = ((np.arange(width) + 0.5) * zoom_x // self.cell).astype(int)
            heat += looks[places][rows][:, columns] * zoom_y * zoom_x / self.cell**2
        return heat


def module_of(part: Any) -> Any:
    """The module that transformers loaded a part's class from."""
    return sys.modules[type(part).__module__]


def cell_places(slots: np.ndarray, grids: Sequence[Sequence[int]], config: Any, layout_class: Any) -> list[np.ndarray]:
    """Where each merged cell of each scale stands among the tokens.

    Args:
        slots: (V,) places of the visual tokens, all scales in a row.
        grids: (frames, rows, columns) of each scale, in patches; single frames.
        config: the vision config, which names the order of the visual tokens.
        layout_class: the model's `PackedLayout`.
    """
    layout = layout_class.build(grids, config, torch.device("cpu"))
    cells = np.empty_like(slots)
    cells[layout.entry[layout.exit].numpy()] = slots
    shapes = [(rows // config.spatial_merge_size, columns // config.spatial_merge_size) for _, rows, columns in grids]
    ends = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
    return [places.reshape(shape) for places, shape in zip(np.split(cells, ends), shapes, strict=True)]


@torch.no_grad()
def compute_maps(
    model: Any, processor: Any, image: Image.Image, question: str, max_new_tokens: int, **pixels: Any
) -> AttentionMaps:
    """Asks about the picture, greedily, then runs question and answer once more and keeps all attention weights.

    Args:
        pixels: settings of `NaViLImageProcessor.plan`, such as `max_pixels`. The weights need memory that grows with
            the square of the tokens.

    Raises:
        ValueError: the model answers nothing.
    """
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    pixels = {"multi_scale": processor.multi_scale, **pixels}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt", **pixels
    ).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    if ids[0, -1] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>"):
        ids = ids[:, :-1]
    if ids.shape[1] == prompt_length:
        raise ValueError(f"the model answers nothing to {question!r}")
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "num_scales")}
    attentions = model(ids, **images, output_attentions=True).attentions

    vision, settings = model.config.vision_config, processor.image_processor
    [plan] = settings.plan(image, **pixels)
    slots = (ids[0] == model.config.image_token_id).nonzero().flatten().cpu().numpy()
    return AttentionMaps(
        weights=torch.stack([layer[0].float().mean(0).cpu() for layer in attentions]).numpy(),
        is_image=model.model.get_visual_token_mask(ids)[0].cpu().numpy(),
        answer=[processor.decode([token]) for token in ids[0, prompt_length:].tolist()],
        places=cell_places(slots, inputs["image_grid_thw"].tolist(), vision, module_of(model).PackedLayout),
        sizes=plan.scales,
        cell=settings.cell,
    )


def draw_layers(maps: AttentionMaps, layers: Sequence[int]) -> Figure:
    """One panel per layer: every token's attention on every other, on a logarithmic scale."""
    length = maps.weights.shape[1]
    edge = max(1.0, length / 40)
    colors = np.where(maps.is_image[:, None], IMAGE_COLOR, TEXT_COLOR)  # (L, RGB)
    figure = Figure(figsize=(4 * len(layers) + 1, 4.6), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    shares = maps.share_on_image()
    for panel, layer in zip(panels, layers, strict=True):
        drawn = panel.imshow(
            np.maximum(maps.weights[layer], 1e-4), norm=LogNorm(1e-4, 1), cmap="magma", extent=(0, length, length, 0)
        )
        panel.imshow(colors[:, None], extent=(-edge, 0, length, 0))
        panel.imshow(colors[None], extent=(0, length, 0, -edge))
        panel.axhline(length - len(maps.answer), color="white", linewidth=0.6)
        panel.set(xlim=(-edge, length), ylim=(length, -edge), xlabel="looks at token")
        panel.set_title(f"layer {layer}: answer looks at image {shares[layer]:.0%}", fontsize=10)
    panels[0].set_ylabel("token (blue: text, green: image)")
    figure.colorbar(drawn, ax=panels, shrink=0.8, label="attention, mean of heads")
    return figure


def draw_token(maps: AttentionMaps, token: int, image: Image.Image) -> Image.Image:
    """The picture in gray, and over it what an answer token looked at: black for nothing, yellow for the most."""
    gray = np.asarray(image.convert("L"))[..., None]
    heat = maps.heat(token, image.height, image.width)
    colors = 255 * colormaps["inferno"](heat / max(heat.max(), np.finfo(heat.dtype).tiny))[..., :3]
    return Image.fromarray(((1 - OPACITY) * gray + OPACITY * colors).round().astype(np.uint8))


def draw_answer(maps: AttentionMaps, image: Image.Image) -> Figure:
    """The picture, and over it what each of the first answer tokens looked at."""
    tokens = range(min(len(maps.answer), MAX_PANELS))
    figure = Figure(figsize=(3 * (len(tokens) + 1), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tokens) + 1)
    panels[0].imshow(image)
    panels[0].set_title("picture", fontsize=10)
    for panel, token in zip(panels[1:], tokens, strict=True):
        panel.imshow(draw_token(maps, token, image))
        panel.set_title(f"{maps.answer[token]!r}", fontsize=10)
    for panel in panels:
        panel.set_axis_off()
    return figure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="model folder or name on the Hub (default: tiny/ of this one)")
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "shapes.png", metavar="FILE")
    parser.add_argument("--question", default="What color is the triangle?", metavar="TEXT")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help=f"from 0 (default: {MAX_PANELS} at most)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("attention"), metavar="DIR", help="default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    source = options.model or ROOT
    settings = {"trust_remote_code": True} | ({} if options.model else {"subfolder": "tiny"})
    try:
        model = AutoModel.from_pretrained(source, **settings).eval()
        processor = AutoProcessor.from_pretrained(source, **settings)
        depth = model.config.text_config.num_hidden_layers
        layers = options.layers or sorted({round(layer) for layer in np.linspace(0, depth - 1, MAX_PANELS)})
        unknown = [layer for layer in layers if not 0 <= layer < depth]
        if unknown:
            raise ValueError(f"--layers {unknown} lie outside the {depth} layers, which count from 0")
        image = module_of(processor.image_processor).load_image(options.image)
        maps = compute_maps(model, processor, image, options.question, options.max_new_tokens)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    print("answer:", "".join(maps.answer).strip())
    for name, figure in (("layers.png", draw_layers(maps, layers)), ("answer.png", draw_answer(maps, image))):
        FigureCanvasAgg(figure).print_png(options.output / name)
        print("wrote", options.output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
