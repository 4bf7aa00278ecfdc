"""Names and shapes: which tensors of one layout make which tensors of another.

    released NaViL  <->  this package          official_rules, export_rules
    text LLM         ->  this package          llm_rules

The shapes of this package's tensors come from the model itself. A `Rule` has the names and shapes on both sides and the
arithmetic between them; most rules only rename a tensor. The others are `patch_rule`, `wqkv_rule`, `output_rule`,
`special_rows_rule` and `grown_rule`. Tensors that come from the same source tensor share a rule, so that it is read
once. docs/conversion.md describes the layouts.
"""

import copy
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from conversion.files import describe_problems
from conversion.read import Shape, Tensors
from navil.configuration_navil import NaViLConfig, NaViLTextConfig
from navil.modeling_navil import NaViLForConditionalGeneration

RELEASED_NAMES = (
    (r"^model\.vision_model\.patch_embedding\.", "vision_model.embeddings.patch_embedding."),
    (r"^model\.vision_model\.blocks\.", "vision_model.encoder.layers."),
    (r"^model\.connector\.norm\.", "mlp1.0."),
    (r"^model\.connector\.fc1\.", "mlp1.1."),
    (r"^model\.connector\.fc2\.", "mlp1.3."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"\.(self_attn|mlp)\.text\.", r".\1."),
    (r"\.self_attn\.visual\.(\w+)\.", r".self_attn.\1_ve."),
    (r"\.mlp\.visual\.", ".mlp_ve."),
)
"""Regular expressions that turn a name of this package into the released one, applied in this order."""

INTERNLM2_NAMES = (
    (r"\.embed_tokens\.", ".tok_embeddings."),
    (r"^language_model\.lm_head\.", "language_model.output."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.[qkv]_proj", ".attention.wqkv"),
    (r"\.self_attn\.o_proj", ".attention.wo"),
    (r"\.mlp(\w*)\.gate_proj\.", r".feed_forward\1.w1."),
    (r"\.mlp(\w*)\.up_proj\.", r".feed_forward\1.w3."),
    (r"\.mlp(\w*)\.down_proj\.", r".feed_forward\1.w2."),
)
"""Applied after `RELEASED_NAMES` where the LLM is InternLM2."""

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
PATCH_KERNEL = "vision_model.embeddings.patch_embedding.weight"
SPECIAL_ROWS = "special_token_embedding.weight"


def released_name(name: str, backbone: str) -> str:
    """The released name of a tensor of this package.

    Args:
        backbone: `model_type` of the released LLM, `internlm2` or `qwen3`.
    """
    for pattern, replacement in RELEASED_NAMES + (INTERNLM2_NAMES if backbone == "internlm2" else ()):
        name = re.sub(pattern, replacement, name)
    return name


def llm_name(name: str, architecture: str) -> str:
    """The name of a text expert's or a shared tensor in a text LLM of transformers' layout, or InternLM2's."""
    return released_name(name, architecture).removeprefix("language_model.")


def meta_model(config: NaViLConfig) -> NaViLForConditionalGeneration:
    """A model without data, which leaves the config as it is."""
    with torch.device("meta"):
        return NaViLForConditionalGeneration(copy.deepcopy(config))


def model_shapes(model: NaViLForConditionalGeneration) -> dict[str, Shape]:
    """Name and shape of each tensor in a model folder; a tied output head is not stored."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def keep(*tensors: Tensor) -> Sequence[Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Tensors that are made together, and the tensors that they are made from.

    `convert` takes the sources and returns the targets, in the order of the names; `invert` is the way back. A rule
    without sources makes new weights.
    """

    targets: Mapping[str, Shape]
    sources: Mapping[str, Shape]
    convert: Callable[..., Sequence[Tensor]] = keep
    invert: Callable[..., Sequence[Tensor]] = keep

    def make(self, tensors: Tensors) -> Sequence[Tensor]:
        """The targets, reading each source once."""
        return self.convert(*(tensors[name] for name in self.sources))


def renaming(targets: Mapping[str, Shape], source: str) -> Rule:
    """One tensor under another name."""
    (shape,) = targets.values()
    return Rule(targets, {source: shape})


def patch_rule(targets: Mapping[str, Shape], patch_size: int) -> Rule:
    """The released patch embedding is a convolution whose stride is its kernel size: a linear layer over a patch."""
    kernel = (3, patch_size, patch_size)
    ((width, _),) = targets.values()
    return Rule(
        targets,
        {PATCH_KERNEL: (width, *kernel)},
        convert=lambda weight: [weight.flatten(1)],
        invert=lambda weight: [weight.unflatten(1, kernel)],
    )


def wqkv_rule(targets: Mapping[str, Shape], source: str, text: NaViLTextConfig) -> Rule:
    """InternLM2's `wqkv` holds, for each key/value head, its query heads, then the key head, then the value head."""
    heads = [text.num_attention_heads // text.num_key_value_heads, 1, 1]  # of q, k and v for each key/value head
    q_shape, k_shape, v_shape = targets.values()

    def split(wqkv: Tensor) -> Sequence[Tensor]:
        grouped = wqkv.unflatten(0, (text.num_key_value_heads, sum(heads), text.head_dim))
        return [part.flatten(0, 2) for part in grouped.split(heads, dim=1)]

    def fuse(*projections: Tensor) -> Sequence[Tensor]:
        grouped = [
            projection.unflatten(0, (text.num_key_value_heads, count, text.head_dim))
            for projection, count in zip(projections, heads, strict=True)
        ]
        return [torch.cat(grouped, dim=1).flatten(0, 2)]

    return Rule(targets, {source: (q_shape[0] + k_shape[0] + v_shape[0], *q_shape[1:])}, split, fuse)


def output_rule(targets: Mapping[str, Shape], wo: str) -> Rule:
    """InternLM2's visual attention output is `wo_ve(wo(x))`; here the visual expert has the product of the matrices."""
    wo_ve = wo.replace(".wo.", ".wo_ve.")
    shape, _ = targets.values()

    def multiply(output: Tensor, visual_output: Tensor) -> Sequence[Tensor]:
        dtype = torch.float32 if output.dtype.itemsize == 2 else torch.float64  # the product is rounded once
        return [output, (visual_output.to(dtype) @ output.to(dtype)).to(output.dtype)]

    def divide(output: Tensor, product: Tensor) -> Sequence[Tensor]:
        return [output, solve_output(output, product, wo_ve)]

    return Rule(targets, {wo: shape, wo_ve: (shape[0], shape[0])}, multiply, divide)


def solve_output(output: Tensor, product: Tensor, name: str) -> Tensor:
    """The matrix that gives `product` when it is multiplied by `output` from the left.

    Raises:
        ValueError: no matrix of this dtype gives the product within 1e-5, or the dtype's epsilon if that is larger.
    """
    dtype = output.dtype
    if torch.equal(product, output):
        return torch.eye(len(output), dtype=dtype)
    try:
        solved = torch.linalg.solve(output.double(), product.double(), left=False).to(dtype)
        error = ((solved.double() @ output.double() - product.double()).norm() / product.double().norm()).item()
    except torch.linalg.LinAlgError:
        error = float("inf")
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    if not error <= tolerance:
        raise ValueError(
            f"cannot express {name}: no {dtype} matrix times wo gives the visual output matrix; the best one has a "
            f"relative error of {error:.1e}, allowed is {tolerance:.1e}"
        )
    return solved


def special_rows_rule(targets: Mapping[str, Shape], table: str, special_ids: Sequence[int]) -> Rule:
    """The 12 rows of `special_token_embedding` replace those in the embedding table.

    Args:
        targets: the embedding table and, if it was tied to it, the output head, which keeps the old rows.
        table: the released name of the embedding table.
        special_ids: rows of the table, in the order of `special_token_embedding`.
    """
    shape = targets[EMBEDDING]

    def write_rows(weight: Tensor, rows: Tensor) -> Sequence[Tensor]:
        embedding = weight.index_copy(0, torch.tensor(special_ids, device=weight.device), rows.to(weight.dtype))
        return [embedding, weight] if HEAD in targets else [embedding]

    def read_rows(weight: Tensor) -> Sequence[Tensor]:
        return [weight, weight[list(special_ids)]]

    return Rule(targets, {table: shape, SPECIAL_ROWS: (len(special_ids), shape[1])}, write_rows, read_rows)


def grown_rule(targets: Mapping[str, Shape], source: str, rows: int) -> Rule:
    """A table of `rows` rows gets new ones, each the mean of the old rows: as logits, they are never the largest."""
    ((new_rows, width),) = targets.values()

    def grow(table: Tensor) -> Sequence[Tensor]:
        if new_rows == rows:
            return [table]
        mean = torch.stack([part.double().sum(0) for part in table.split(4096)]).sum(0) / rows
        return [torch.cat([table, mean.to(table.dtype).expand(new_rows - rows, -1)])]

    return Rule(targets, {source: (rows, width)}, grow)


def drop_tied_head(tensors: Tensors, embedding: str, head: str) -> None:
    """Leaves a tied source's table under the name `embedding`; it may be stored under either name or under both.

    Raises:
        ValueError: a tied head that differs from the embedding table.
    """
    if head in tensors and embedding in tensors and not torch.equal(tensors[embedding], tensors[head]):
        raise ValueError(f"tie_word_embeddings is true but {head} differs from {embedding}")
    if head in tensors:
        stored = tensors.remove(head)
        if embedding not in tensors:
            tensors.add(embedding, *stored)


def official_rules(config: NaViLConfig, backbone: str, special_ids: Sequence[int], tied: bool = False) -> list[Rule]:
    """Rules for every tensor of this package's layout, from the released layout.

    Args:
        config: of the model to make.
        backbone: `internlm2` or `qwen3`, the released LLM.
        special_ids: ids of the 12 image tokens in the row order of `special_token_embedding`.
        tied: whether the source's output head is its embedding table.
    """
    shapes, text = model_shapes(meta_model(config)), config.text_config
    rules = []
    for source, targets in by_source(shapes, partial(released_name, backbone=backbone), tied):
        if source == PATCH_KERNEL:
            rule = patch_rule(targets, config.vision_config.patch_size)
        elif EMBEDDING in targets:
            rule = special_rows_rule(targets, source, special_ids)
        elif ".wqkv" in source:
            rule = wqkv_rule(targets, source, text)
        elif ".wo." in source:
            rule = output_rule(targets, source)
        else:
            rule = renaming(targets, source)
        rules.append(rule)
    return rules


def export_rules(config: NaViLConfig, backbone: str, special_ids: Sequence[int], dtype: torch.dtype) -> list[Rule]:
    """Rules for every tensor of the released layout, from this package's: `official_rules` inverted.

    Args:
        dtype: of the released weights. Sources are cast to it first, so that `solve_output` solves for the numbers that
            are written.
    """

    def inverted(rule: Rule) -> Rule:
        return Rule(rule.sources, rule.targets, lambda *tensors: rule.invert(*(tensor.to(dtype) for tensor in tensors)))

    return [inverted(rule) for rule in official_rules(config, backbone, special_ids)]


def llm_rules(config: NaViLConfig, architecture: str, rows: int, seed: int) -> list[Rule]:
    """Rules for every tensor of this package's layout, from a text LLM's.

    The LLM's weights become the text experts and, copied, the visual experts. The vision encoder and the connector get
    new weights.

    Args:
        config: of the model to make.
        architecture: `model_type` of the LLM.
        rows: rows of the LLM's embedding table.
        seed: of the new weights.
    """
    model = meta_model(config)
    rules = [*new_weight_rules(model, seed)]
    made = {name for rule in rules for name in rule.targets}
    shapes = {name: shape for name, shape in model_shapes(model).items() if name not in made and ".visual." not in name}
    for source, targets in by_source(shapes, partial(llm_name, architecture=architecture)):
        if EMBEDDING in targets or HEAD in targets:
            rules.append(grown_rule(targets, source, rows))
        elif ".wqkv" in source:
            rules.append(with_visual_copies(wqkv_rule(targets, source, config.text_config)))
        else:
            rules.append(with_visual_copies(renaming(targets, source)))
    return rules


def by_source(
    shapes: Mapping[str, Shape], source_name: Callable[[str], str], tied: bool = False
) -> Collection[tuple[str, dict[str, Shape]]]:
    """Targets with their shapes, grouped by the source tensor that they come from; InternLM2's `wo_ve` is with `wo`."""
    groups: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        source = source_name(EMBEDDING if tied and name == HEAD else name)
        groups[source.replace(".wo_ve.", ".wo.")][name] = shape
    return groups.items()


def with_visual_copies(rule: Rule) -> Rule:
    """The rule with the visual experts' tensors as further targets, if it has text experts' tensors."""
    if not any(".text." in name for name in rule.targets):
        return rule
    copies = {name.replace(".text.", ".visual."): shape for name, shape in rule.targets.items()}
    return Rule({**rule.targets, **copies}, rule.sources, lambda *tensors: [*rule.convert(*tensors)] * 2)


def new_weight_rules(model: NaViLForConditionalGeneration, seed: int) -> Iterator[Rule]:
    """The vision encoder and the connector as the model initializes them, each module from a seed of its own."""
    for prefix, initialize in (  # `_init_weights` is transformers' hook for the initialization of a module
        ("model.vision_model", model.vision_model._init_weights),
        ("model.connector", model._init_weights),
    ):
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            parameters = dict(module.named_parameters(prefix=name, recurse=False))
            if parameters:
                targets = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
                module_seed = zlib.crc32(f"{seed} {next(iter(targets))}".encode())
                yield Rule(targets, {}, partial(new_weights, module, initialize, module_seed))


def new_weights(module: nn.Module, initialize: Callable[[nn.Module], None], seed: int) -> Sequence[Tensor]:
    """A module's own parameters, made on the CPU from a module without data."""
    module = copy.deepcopy(module).to_empty(device="cpu", recurse=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialize(module)
    return [parameter.detach() for parameter in module.parameters(recurse=False)]


def shape_problems(expected: Mapping[str, Shape], actual: Mapping[str, Shape]) -> dict[str, Collection[str]]:
    """Missing, unknown and misshapen tensors."""
    shared = expected.keys() & actual.keys()
    return {
        "missing": expected.keys() - actual.keys(),
        "unknown": actual.keys() - expected.keys(),
        "misshapen": [f"{n} is {actual[n]}, not {expected[n]}" for n in shared if actual[n] != expected[n]],
    }


def check_sources(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> None:
    """Raises a ValueError unless the source has all tensors that the rules need, in their shapes, and no others."""
    expected = {name: shape for rule in rules for name, shape in rule.sources.items()}
    problems = describe_problems(shape_problems(expected, shapes))
    if problems:
        raise ValueError(f"the source has other tensors than its config says: {problems}")
