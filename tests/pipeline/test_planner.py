"""Plans for real models: which linear gets which grid, and what is refused before hours are spent."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from optimum_qvlm.errors import ConfigError, SpecError, UnsupportedModelError
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.options import CalibrationOptions, LinearChoice
from optimum_qvlm.pipeline.planner import make_plan
from optimum_qvlm.plan import Block, PlannedLinear, QuantPlan, Site
from optimum_qvlm.spec import ActivationSpec, GroupSize, Scheme, WeightSpec
from tests.tiny_models import llama_config, tiny_llama, tiny_llava

ATTENTION = ("q_proj", "k_proj", "v_proj")


def choice(scheme: str | None, group_size: GroupSize = "auto", *, symmetric: bool = True) -> LinearChoice:
    if scheme is None:
        return LinearChoice(weight=None)
    bits = Scheme.parse(scheme)
    weight = WeightSpec(bits=bits.weight_bits, symmetric=symmetric)
    return LinearChoice(weight=weight, activation_bits=bits.activation_bits, group_size=group_size)


def on_levels(choice: LinearChoice, **changes: object) -> LinearChoice:
    """The choice with two-level scales."""
    return replace(choice, weight=replace(choice.weight, two_level=True), **changes)


def disk_name(path: str) -> str:
    """Names as published LLaVA checkpoints have them, which are not those at run time."""
    if path.startswith("model.language_model."):
        return path.replace("model.language_model.", "language_model.model.", 1)
    return path.removeprefix("model.")


def plan_for(
    model: nn.Module,
    language: LinearChoice | None = None,
    vision: LinearChoice | None = None,
    *,
    keep: tuple[str, ...] = (),
    overrides: dict[str, LinearChoice] | None = None,
) -> QuantPlan:
    """The plan under `w4a8`, with `w8a8` for vision, unless other choices are given."""
    options = CalibrationOptions(
        language=choice("w4a8") if language is None else language,
        vision=choice("w8a8") if vision is None else vision,
        keep=keep,
        overrides=tuple((overrides or {}).items()),
    )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return make_plan(adapter_for(model), options, {path: disk_name(path) for path in linears})


def by_name(plan: QuantPlan) -> dict[str, PlannedLinear]:
    return {linear.name: linear for linear in plan.linears()}


def site_of(plan: QuantPlan, ending: str) -> Site:
    """The first site with a linear whose name ends so."""
    return next(site for site in plan.sites() if any(linear.name.endswith(ending) for linear in site.linears))


def leaves(site: Site) -> set[str]:
    return {linear.name.rpartition(".")[2] for linear in site.linears}


def test_language_and_vision_have_their_own_schemes():
    """The tower and the projector are vision."""
    plan = plan_for(tiny_llava())

    for name, linear in by_name(plan).items():
        vision = name.startswith(("vision_tower.", "multi_modal_projector."))
        group = None if vision else 32 if linear.in_features == 96 else 64
        assert linear.weight == WeightSpec(bits=8 if vision else 4, group=group), name
    assert {site.activation for site in plan.sites()} == {ActivationSpec(bits=8)}


def test_two_level_scales_are_for_language_linears_whose_products_gain():
    """Not for the tower, nor where an override leaves no product of bytes or a single scale per row."""
    levels = on_levels(choice("w4a8", 32))
    others = {
        "*.q_proj": on_levels(choice("w4a16")),
        "*.k_proj": choice("w8a8"),
        "*.v_proj": on_levels(choice("w4a4", 32)),
        "*.o_proj": on_levels(choice("w4a8", None)),
        "*.up_proj": choice("w4a8", 32, symmetric=False),
        "*.gate_proj": on_levels(choice("w3a8", 32)),
    }

    plan = plan_for(tiny_llava(), levels, on_levels(choice("w4a8")), overrides=others)

    chosen = {linear.name.rpartition(".")[2] for linear in plan.linears() if linear.weight.two_level}
    assert chosen == {"down_proj", "gate_proj"}
    assert not any(linear.weight.two_level for linear in plan.linears() if linear.name.startswith("vision_tower."))


def test_static_activations_have_one_scale_too():
    """So products of any bits gain."""
    plan = plan_for(tiny_llava(), on_levels(choice("w4a4", 32), static=True))

    language = [linear for linear in plan.linears() if linear.name.startswith("language_model.")]
    assert language and all(linear.weight.two_level for linear in language)


def test_linears_are_described_as_they_are():
    model = tiny_llava()

    plan = plan_for(model)

    for linear in plan.linears():
        module = model.get_submodule(linear.path)
        assert (linear.in_features, linear.out_features) == (module.in_features, module.out_features)
        assert linear.bias == (module.bias is not None)
        assert linear.name == disk_name(linear.path)


def test_parts_layers_and_blocks_are_in_execution_order():
    plan = plan_for(tiny_llava())

    assert [(part.name, len(part.layers)) for part in plan.parts] == [("vision", 2), ("projector", 1), ("language", 2)]
    assert [layer.name for layer in plan.parts[2].layers] == [f"language_model.model.layers.{n}" for n in range(2)]
    assert [layer.path for layer in plan.parts[2].layers] == [f"model.language_model.layers.{n}" for n in range(2)]
    assert plan.parts[1].layers[0].name == "multi_modal_projector"
    expected = [("vision", 0), ("vision", 1), ("projector", 0), ("language", 0), ("language", 1)]
    assert plan.blocks == tuple(Block(part=part, first=n, last=n) for part, n in expected)


@pytest.mark.parametrize("group_size", [8, 16, 32])
@pytest.mark.parametrize("scheme", ["w4a8", "w2a4", "w6a6"])
def test_an_explicit_group_is_that_of_all_language_linears(group_size, scheme):
    plan = plan_for(tiny_llava(), language=choice(scheme, group_size))

    language = [linear for name, linear in by_name(plan).items() if name.startswith("language_model.")]
    assert {linear.weight.group for linear in language} == {group_size}


@pytest.mark.parametrize("group_size", [64, 48, 128])
def test_an_explicit_group_that_does_not_divide_is_refused_with_module_and_way_out(group_size):
    """The MLP is 96 wide and the rest 64; the first linear that does not fit is named as on disk."""
    model = tiny_llava()
    name, width = ("mlp.down_proj", 96) if group_size == 64 else ("self_attn.q_proj", 64)
    way_out = '32, 16, "auto" or None'

    message = rf"^language_model\.model\.layers\.0\.{name}: group={group_size} does not divide in_features={width}; "
    with pytest.raises(SpecError, match=f"{message}use .*{way_out}"):
        plan_for(model, language=choice("w4a8", group_size))


def test_no_group_is_one_scale_per_row():
    plan = plan_for(tiny_llama(), language=choice("w4a4", None))

    assert {linear.weight.group for linear in plan.linears()} == {None}
    assert {site.activation for site in plan.sites()} == {ActivationSpec(bits=4, fitted=True)}


@pytest.mark.parametrize("scheme, bits", [("w4a4", 4), ("w6a6", 6)])
def test_activations_below_eight_bits_have_the_groups_of_their_weights(scheme, bits):
    plan = plan_for(tiny_llama(), language=choice(scheme))

    assert site_of(plan, "q_proj").activation == ActivationSpec(bits=bits, group=64, fitted=bits == 4)
    assert site_of(plan, "down_proj").activation == ActivationSpec(bits=bits, group=32, fitted=bits == 4)


def test_weight_only_schemes_leave_activations_alone():
    plan = plan_for(tiny_llama(), language=choice("w4a16"))

    assert {site.activation for site in plan.sites()} == {None}


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_are_planned_where_asked_for(symmetric):
    plan = plan_for(tiny_llama(), language=choice("w4a8", symmetric=symmetric))

    assert {linear.weight.symmetric for linear in plan.linears()} == {symmetric}


def test_linears_of_one_input_share_a_site():
    plan = plan_for(tiny_llama(num_hidden_layers=1))

    assert [leaves(site) for site in plan.sites()] == [
        set(ATTENTION),
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]


def test_an_override_of_the_activation_splits_a_site():
    """Each input is rounded to one grid per site, so two grids are two sites."""
    plan = plan_for(tiny_llama(), overrides={"layers.0.self_attn.v_proj": choice("w4a16")})

    attention = [site for site in plan.sites() if leaves(site) & set(ATTENTION)]
    assert [leaves(site) for site in attention] == [{"q_proj", "k_proj"}, {"v_proj"}, set(ATTENTION)]
    assert [site.activation for site in attention] == [ActivationSpec(bits=8), None, ActivationSpec(bits=8)]


def test_an_override_of_the_weight_alone_keeps_the_site():
    plan = plan_for(tiny_llama(num_hidden_layers=1), overrides={"v_proj": choice("w8a8")})

    site = site_of(plan, "v_proj")
    assert leaves(site) == set(ATTENTION)
    assert {linear.name.rpartition(".")[2]: linear.weight.bits for linear in site.linears} == {
        "q_proj": 4,
        "k_proj": 4,
        "v_proj": 8,
    }


def test_the_first_override_that_matches_decides():
    plan = plan_for(tiny_llama(), overrides={"layers.0.mlp": choice("w8a8"), "*.mlp.*": choice("w2a8")})

    bits = {(linear.name.split(".")[1], linear.weight.bits) for linear in plan.linears() if ".mlp." in linear.name}
    assert bits == {("0", 8), ("1", 2)}


def test_an_override_wins_over_keep_and_over_the_part():
    plan = plan_for(tiny_llava(), keep=("mlp",), overrides={"vision_tower.encoder.layers.1.mlp": choice("w4a8")})

    mlp = {name: linear.weight.bits for name, linear in by_name(plan).items() if ".mlp." in name}
    assert mlp == {f"vision_tower.encoder.layers.1.mlp.fc{n}": 4 for n in (1, 2)}


def test_an_override_can_keep_full_precision():
    plan = plan_for(tiny_llama(), overrides={"down_proj": choice(None)})

    assert {name for name in plan.kept if name.endswith("down_proj")} == {f"layers.{n}.mlp.down_proj" for n in range(2)}


@pytest.mark.parametrize(
    "keep, count",
    [(("layers.0",), 7), (("o_proj",), 3), (("*.mlp.*",), 9), (("layers.1.self_attn.q_proj",), 1), (("0", "2"), 14)],
)
def test_patterns_keep_what_they_match(keep, count):
    """And nothing else; kept are named as on disk, the output embedding among them."""
    model = tiny_llama(num_hidden_layers=3)

    plan = plan_for(model, keep=keep)

    everything = {disk_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(plan.kept) == count + 1
    assert {*plan.kept, *by_name(plan)} == everything
    assert not set(plan.kept) & set(by_name(plan))


@pytest.mark.parametrize("build", [tiny_llama, tiny_llava])
def test_the_output_embedding_is_kept_unless_asked_for(build):
    assert plan_for(build()).kept == ("lm_head",)


def test_vision_can_be_kept_as_a_whole():
    plan = plan_for(tiny_llava(), vision=choice(None))

    assert all(name.startswith("language_model.") for name in by_name(plan))
    assert [(part.name, len(part.layers)) for part in plan.parts][:2] == [("vision", 2), ("projector", 1)]
    assert all(layer.sites == () for part in plan.parts[:2] for layer in part.layers)


@pytest.mark.parametrize("where", ["keep", "overrides"])
@pytest.mark.parametrize("pattern, close", [("layers.0.mlp.upproj", "layers.0.mlp.up_proj"), ("lm_haed", "lm_head")])
def test_a_pattern_that_matches_nothing_is_refused_with_close_names(where, pattern, close):
    patterns = {"keep": (pattern,)} if where == "keep" else {"overrides": {pattern: choice("w8a8")}}

    with pytest.raises(ConfigError, match=f"'{pattern}' matches no linear of the model; close: .*{close}"):
        plan_for(tiny_llama(), **patterns)


def test_patterns_match_names_on_disk():
    """Those are what the plan prints; run-time names change between releases."""
    with pytest.raises(ConfigError, match=r"'model\.language_model\.layers\.0' matches no linear"):
        plan_for(tiny_llava(), keep=("model.language_model.layers.0",))


@pytest.mark.parametrize("build", [tiny_llama, tiny_llava])
def test_an_override_makes_the_output_embedding_a_part(build):
    plan = plan_for(build(), overrides={"lm_head": choice("w8a8")})

    head = plan.parts[-1]
    assert (head.name, [layer.path for layer in head.layers]) == ("head", ["lm_head"])
    assert plan.blocks[-1] == Block(part="head", first=0, last=0)
    assert by_name(plan)["lm_head"].weight == WeightSpec(bits=8)
    assert plan.kept == ()


def test_an_override_to_full_precision_leaves_the_output_embedding_alone():
    plan = plan_for(tiny_llama(), overrides={"lm_head": choice(None)})

    assert [part.name for part in plan.parts] == ["language"]
    assert plan.kept == ("lm_head",)


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_llama(tie_word_embeddings=True),
        lambda: tiny_llava(tie_word_embeddings=True, text={"tie_word_embeddings": True}),
    ],
    ids=["llama", "llava"],
)
def test_a_tied_output_embedding_is_refused(model):
    """Its weight is the input embedding's, which stays."""
    with pytest.raises(ConfigError, match=r"lm_head shares its weight with the input embedding.*remove its override"):
        plan_for(model(), overrides={"lm_head": choice("w8a8")})


def test_a_tied_output_embedding_that_is_not_asked_for_is_kept():
    assert plan_for(tiny_llama(tie_word_embeddings=True)).kept == ("lm_head",)


@pytest.mark.parametrize(
    "changes",
    [
        {"language": choice(None)},
        {"keep": ("layers.0", "layers.1")},
        {"overrides": {"*": choice(None)}},
    ],
    ids=["scheme", "keep", "override"],
)
def test_a_plan_that_quantizes_nothing_is_refused(changes):
    with pytest.raises(UnsupportedModelError, match="nothing is left to quantize: every linear is kept"):
        plan_for(tiny_llama(), **changes)


def test_the_model_is_left_alone():
    """A plan is also made for a dry run."""
    model = tiny_llama()
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}

    plan_for(model, overrides={"lm_head": choice("w8a8")})

    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before


def test_layers_that_nothing_reads_are_planned_but_in_no_part_and_no_block():
    """Their bytes count, so they are quantized; there is nothing to search them on."""
    plan = plan_for(tiny_llava())

    (unused,) = plan.unused
    assert unused.name == "vision_tower.encoder.layers.2"
    assert unused.path not in {layer.path for part in plan.parts for layer in part.layers}
    assert len([site for site in plan.sites() if site in unused.sites]) == len(unused.sites) == 4
    assert {linear.weight for site in unused.sites for linear in site.linears} == {WeightSpec(bits=8)}


def test_patterns_reach_layers_that_nothing_reads():
    plan = plan_for(tiny_llava(), keep=("encoder.layers.2",))

    assert plan.unused[0].sites == ()
    assert sum("encoder.layers.2." in name for name in plan.kept) == 6


class FusedExperts(nn.Module):
    """As transformers holds the experts of a mixture."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 64))


@pytest.mark.parametrize(
    "experts", [FusedExperts(), nn.ModuleList([nn.Linear(64, 64)])], ids=["in one tensor", "in a list"]
)
@pytest.mark.parametrize("build, path", [(tiny_llama, "model.layers.1"), (tiny_llava, "model.language_model.layers.0")])
def test_experts_are_refused(build, path, experts):
    """In one tensor they would stay as they are, in a list most would see no sample: both without a word."""
    model = build()
    model.get_submodule(path).mlp.experts = experts

    message = rf"{path}\.mlp\.experts holds the experts of a mixture .* use a dense model"
    with pytest.raises(UnsupportedModelError, match=message):
        plan_for(model)


def test_convolutions_are_no_experts():
    """Their weights have more than two dimensions too."""
    model = tiny_llama()
    model.model.layers[0].mlp.mixing = nn.Conv1d(64, 64, 3)

    assert len(plan_for(model).linears()) == 14


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_mixtures_of_transformers_are_refused(model_type):
    """The real classes, since what they hold experts in changed before."""
    values = llama_config().to_diff_dict() | {"model_type": model_type, "moe_intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values, num_experts=4, num_local_experts=4))

    with pytest.raises(UnsupportedModelError, match="holds the experts of a mixture"):
        plan_for(model)


def test_vectors_of_three_dimensions_are_no_experts():
    """Some models keep weights per channel so."""
    model = tiny_llama()
    model.model.layers[0].mlp.mixing = nn.Parameter(torch.ones(1, 1, 64))

    assert len(plan_for(model).linears()) == 14


def test_real_widths_of_qwen2_5_vl_fall_to_smaller_groups_or_rows():
    """3420 channels inside the tower's MLP are divided by none of the groups, 18944 in the decoder by the largest."""
    vision = {"depth": 1, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 100}
    config = AutoConfig.for_model("qwen2_5_vl", vision_config=vision, text_config=text)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)

    plan = plan_for(model, vision=choice("w4a8"))

    groups = {linear.in_features: linear.weight.group for linear in plan.linears()}
    assert groups == {1280: 128, 3420: None, 5120: 128, 3584: 128, 18944: 128}
