# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import copy
from dataclasses import fields

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from tests import tiny
from trl_diffusion.trainer.lora import (
    ACCEPTED_FIELDS,
    REFUSED_FIELDS,
    base_checksums,
    check_adapters_off,
    check_lora_config,
    check_mixes,
    check_trainable,
    load_lora_into,
    read_lora,
)


PIPELINES = {"sd": tiny.sd_pipeline, "sdxl": tiny.sdxl_pipeline}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCKS = BdLoraConfig(target_modules_bd_a=["to_out.0"], target_modules_bd_b=["to_q", "to_k", "to_v"], nblocks=2)

ACCEPTED = {
    "default": {},
    "r=1": {"r": 1},
    "r above the layers' size": {"r": 64},
    "alpha": {"lora_alpha": 2.5},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {r"down_blocks.*attn2\.to_q": 2, "to_k": 3}},
    "alpha_pattern": {"alpha_pattern": {"attn2.to_q": 3}, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "mica": {"init_lora_weights": "mica"},
    "lora_bias": {"lora_bias": True, "target_modules": ["to_out.0", "conv1"]},
    "dropout": {"lora_dropout": 0.5},
    "bdlora": {"use_bdlora": BLOCKS},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*attn2\.to_[kv]"},
    "convolutions": {"target_modules": ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in"]},
    "time embeddings": {"target_modules": ["linear_1", "linear_2", "time_emb_proj"]},
    "exclude_modules": {"exclude_modules": ["to_q"]},
    "exclude_modules by expression": {"exclude_modules": r".*attn1.*"},
    "layers_to_transform": {"layers_to_transform": [0]},
    "layers_pattern": {"layers_to_transform": 0, "layers_pattern": "transformer_blocks"},
    "runtime_config": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
    "names": {"base_model_name_or_path": "/home/me/base", "revision": "main", "peft_version": "0.1"},
}

ON_SDXL = ["default", "rank_pattern", "lora_bias", "all-linear", "convolutions"]

# Settings, and what the message must say
REFUSED = {
    "bias of all": ({"bias": "all"}, "`bias='all'`.*while the adapter is off"),
    "bias of its layers": ({"bias": "lora_only"}, "`bias='lora_only'`"),
    "modules_to_save": ({"modules_to_save": ["conv_in"]}, "`modules_to_save="),
    "trainable_token_indices": ({"trainable_token_indices": {"conv_in": [0]}}, "`trainable_token_indices="),
    "target_parameters": ({"target_parameters": ["to_q.weight"]}, "`target_parameters=.*cannot read"),
    "layer_replication": ({"layer_replication": [(0, 1)]}, "`layer_replication="),
    "kasa_config": ({"kasa_config": KasaConfig()}, "`kasa_config="),
    "corda_config": ({"corda_config": CordaConfig()}, "`corda_config="),
    "eva_config": ({"eva_config": EvaConfig(), "init_lora_weights": "eva"}, "`eva_config="),
    "lora_ga_config": ({"lora_ga_config": LoraGAConfig(), "init_lora_weights": "lora_ga"}, "`lora_ga_config="),
    "velora_config": ({"velora_config": VeloraConfig(num_groups=4)}, "`velora_config="),
    "monteclora_config": ({"monteclora_config": MontecloraConfig()}, "`monteclora_config="),
    "arrow_config": ({"arrow_config": ArrowConfig()}, "`arrow_config="),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens="),
    "use_qalora": ({"use_qalora": True}, "`use_qalora=True`"),
    "qalora_group_size": ({"qalora_group_size": 8}, "`qalora_group_size=8`"),
    "megatron_config": ({"megatron_config": {"a": 1}}, "`megatron_config="),
    "megatron_core": ({"megatron_core": "mine"}, "`megatron_core='mine'`"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "`fan_in_fan_out=True`"),
    "ensure_weight_tying": ({"ensure_weight_tying": True}, "`ensure_weight_tying=True`"),
    "task_type": ({"task_type": "FEATURE_EXTRACTION"}, "`task_type="),
    "random start": ({"init_lora_weights": False}, "`init_lora_weights=False`.*random update"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa'`.*no longer the reference"),
    "pissa by iterations": ({"init_lora_weights": "pissa_niter_2"}, "'pissa_niter_2'`"),
    "olora": ({"init_lora_weights": "olora"}, "'olora'`.*no longer the reference"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, "'orthogonal'`.*rounding"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga'`"),
    "a start that nobody knows": ({"init_lora_weights": "mine"}, "'mine'`.*does not know"),
    "inference_mode": ({"inference_mode": True}, "`inference_mode=True`.*nothing is trained"),
    "r=0": ({"r": 0}, "`r` of `peft_config` must be a whole number of at least 1, got 0"),
    "r=-4": ({"r": -4}, "got -4"),
    "r=2.5": ({"r": 2.5}, "got 2.5"),
    "r=True": ({"r": True}, "got True"),
    "rank of a pattern": ({"rank_pattern": {"to_q": 0}}, r"`rank_pattern\['to_q'\]` .* got 0"),
    "alpha=0": ({"lora_alpha": 0}, "`lora_alpha` of `peft_config` must be a positive number, got 0"),
    "alpha=-8": ({"lora_alpha": -8}, "got -8"),
    "alpha is not a number": ({"lora_alpha": float("nan")}, "got nan"),
    "alpha without bound": ({"lora_alpha": float("inf")}, "got inf"),
    "alpha of a pattern": ({"alpha_pattern": {"to_q": 0}}, r"`alpha_pattern\['to_q'\]`"),
    "dropout=1": ({"lora_dropout": 1.0}, "`lora_dropout` .* less than 1, got 1.0"),
    "dropout below 0": ({"lora_dropout": -0.1}, "got -0.1"),
    "no module": ({"target_modules": ["nope"]}, "leaves no module of the `UNet2DConditionModel` to train"),
    "no module by expression": ({"target_modules": "nope"}, "leaves no module"),
    "empty list": ({"target_modules": []}, "leaves no module"),
    "all excluded": ({"exclude_modules": ATTENTION}, "leaves no module"),
    "no such layer": ({"layers_to_transform": [7]}, "leaves no module"),
    "no expression": ({"target_modules": "(to_q"}, "no regular expression"),
    "one name of several": ({"target_modules": ["to_q", "nope"]}, "ignored: `target_modules` 'nope'"),
    "an exclusion": ({"exclude_modules": ["to_q", "nope"]}, "ignored: `exclude_modules` 'nope'"),
    "an exclusion by expression": ({"exclude_modules": ".*nope"}, "ignored: `exclude_modules` '.*nope'"),
    "one layer of several": ({"layers_to_transform": [0, 7]}, "ignored: `layers_to_transform` 7"),
    "a pattern of ranks": ({"rank_pattern": {"nope": 2}}, "ignored: `rank_pattern` 'nope'"),
    "a pattern of alphas": ({"alpha_pattern": {"conv1": 2}}, "ignored: `alpha_pattern` 'conv1'"),
    "LayerNorm": ({"target_modules": ["norm1"]}, "'.*norm1', a `LayerNorm`|'.*norm1', a `GroupNorm`"),
    "GroupNorm": ({"target_modules": ["conv_norm_out"]}, "'conv_norm_out', a `GroupNorm`"),
    "a block": ({"target_modules": ["attn1"]}, "attn1', a `Attention`"),
    "a list of blocks": ({"target_modules": ["down_blocks"]}, "'down_blocks', a `ModuleList`"),
    "mica of convolutions": (
        {"init_lora_weights": "mica", "target_modules": ["to_q", "conv1"]},
        "linear layers alone.*conv1",
    ),
    "bdlora of convolutions": ({"use_bdlora": BLOCKS, "target_modules": ["to_q", "conv1"]}, "linear layers alone"),
}


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    """One for all checks, which change nothing."""
    return tiny.sd_pipeline().unet


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings)


def inputs(family: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    width = 32 if family == "sdxl" else 16
    given = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([500, 20]),
        "encoder_hidden_states": torch.randn(2, 12, width, generator=generator),
    }
    if family == "sdxl":
        text_embeds = torch.randn(2, 16, generator=generator)
        given["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": torch.full((2, 6), 32.0)}
    return given


@torch.no_grad()
def predict(model: torch.nn.Module, family: str = "sd", adapters: bool = True) -> torch.Tensor:
    """As a trainer switches adapters off."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = not adapters
    prediction = model.eval()(**inputs(family)).sample
    for layer in layers:
        layer._disable_adapters = False
    return prediction


def adapted(pipeline, config: LoraConfig) -> PeftModel:
    """As a trainer adds a LoRA."""
    pipeline.unet.requires_grad_(False)
    config = check_lora_config(config, pipeline.unet)
    before = base_checksums(pipeline.unet)
    torch.manual_seed(0)
    model = get_peft_model(pipeline.unet, config)
    check_adapters_off(model, before)
    check_trainable(model)
    return model


def move(model: PeftModel) -> None:
    """Changes all that is trained."""
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def save(pipeline, model: PeftModel, folder) -> None:
    """As a trainer saves a LoRA."""
    weights = get_peft_model_state_dict(model)
    pipeline.save_lora_weights(
        folder,
        unet_lora_layers={name.removeprefix("base_model.model."): weight for name, weight in weights.items()},
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )


class TestFields:
    def test_every_field_is_classified(self):
        """Each field of peft's configuration is either accepted or refused: a new one must be tried first."""
        assert ACCEPTED_FIELDS | REFUSED_FIELDS.keys() == {field.name for field in fields(LoraConfig)}
        assert not ACCEPTED_FIELDS & REFUSED_FIELDS.keys()

    def test_every_refused_field_is_tried(self):
        """The table of refusals has each of them, by its own reason."""
        tried = {name for settings, _ in REFUSED.values() for name in settings}
        assert REFUSED_FIELDS.keys() - tried == {"loftq_config"}  # needs scipy: see below

    def test_every_accepted_field_is_tried(self):
        """The table of what is right has each that bears on anything."""
        tried = {name for settings in ACCEPTED.values() for name in settings}
        assert ACCEPTED_FIELDS - tried == {"use_dora", "inference_mode", "peft_type", "auto_mapping"}


class TestAccepted:
    @pytest.mark.parametrize(
        ("family", "settings"),
        [("sd", settings) for settings in ACCEPTED.values()] + [("sdxl", ACCEPTED[name]) for name in ON_SDXL],
        ids=[*ACCEPTED, *(f"sdxl {name}" for name in ON_SDXL)],
    )
    def test_off_first_and_saved(self, tmp_path, family, settings):
        """To the last digit: before training it changes nothing; trained, it is the base when off; diffusers reads its file."""
        pipeline = PIPELINES[family]()
        base = predict(PIPELINES[family]().unet, family)
        model = adapted(pipeline, lora(**settings))
        assert torch.equal(predict(model, family), base)
        move(model)
        trained = predict(model, family)
        assert (trained - base).abs().max() > 1e-3
        assert torch.equal(predict(model, family, adapters=False), base)

        save(pipeline, model, tmp_path)
        plain = PIPELINES[family]()
        plain.load_lora_weights(tmp_path)
        assert torch.equal(predict(plain.unet, family), trained)

        weights, config = read_lora(tmp_path)
        read = PIPELINES[family]().unet
        read = get_peft_model(read, check_lora_config(config, read, "`expert`", loaded=True))
        load_lora_into(read, weights, "`expert`")
        assert torch.equal(predict(read, family), trained)

    @pytest.mark.parametrize("settings", ACCEPTED.values(), ids=ACCEPTED)
    def test_first_in_half_precision(self, settings):
        """In bfloat16 too, policy and reference are the same to the last digit before training."""
        pipeline = tiny.sd_pipeline()
        pipeline.unet.to(torch.bfloat16)
        model = adapted(pipeline, lora(**settings))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(predict(model), predict(model, adapters=False))

    def test_dora_in_float32_alone(self):
        """A DoRA starts from the base exactly in float32, and is refused in half precision, where it does not."""
        pipeline = tiny.sd_pipeline()
        base = predict(tiny.sd_pipeline().unet)
        model = adapted(pipeline, lora(use_dora=True))
        assert torch.equal(predict(model), base)
        move(model)
        assert torch.equal(predict(model, adapters=False), base)

        half = tiny.sd_pipeline().unet.to(torch.bfloat16)
        with pytest.raises(ValueError, match="`use_dora=True`.*half precision.*float32"):
            check_lora_config(lora(use_dora=True), half)
        model = get_peft_model(half, lora(use_dora=True))
        with torch.autocast("cpu", torch.bfloat16):
            assert (predict(model) - predict(model, adapters=False)).abs().max() > 1e-3

    def test_a_copy(self):
        """What is given is not changed, nor shared."""
        config = lora(rank_pattern={"to_q": 2})
        before = copy.deepcopy(config.to_dict())
        checked = check_lora_config(config, tiny.sd_pipeline().unet)
        assert checked is not config and checked.rank_pattern is not config.rank_pattern
        assert config.to_dict() == checked.to_dict() == before

    def test_default_target_modules(self):
        """Target modules that are left out stay so: the trainer fills them in."""
        assert check_lora_config(LoraConfig(), tiny.sd_pipeline().unet).target_modules is None


class TestRefused:
    @pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
    def test_by_name(self, unet, settings, message):
        """The message names the setting and its value, or what is wrong with it."""
        with pytest.raises(ValueError, match=message) as error:
            check_lora_config(lora(**settings), unet)
        assert "`peft_config`" in str(error.value)

    @pytest.mark.parametrize("init", ["corda", "loftq"])
    def test_starts_that_peft_makes_with_other_packages(self, unet, init):
        """Refused whether or not those packages are installed."""
        config = lora()
        config.init_lora_weights = init
        with pytest.raises(ValueError, match=f"'{init}'`.*no longer the reference"):
            check_lora_config(config, unet)

    def test_loftq(self, unet):
        """Its settings replace weights of the base."""
        config = lora()
        config.loftq_config = {"loftq_bits": 4}
        with pytest.raises(ValueError, match="`loftq_config=.*quantised"):
            check_lora_config(config, unet)

    @pytest.mark.parametrize(
        "config",
        [LoHaConfig(target_modules=["to_q"]), AdaLoraConfig(target_modules=["to_q"], total_step=9), {"r": 4}],
        ids=["LoHa", "AdaLoRA", "dict"],
    )
    def test_other_kinds(self, unet, config):
        """Only a LoRA, and no class that derives from it, has a file that diffusers reads."""
        with pytest.raises(ValueError, match=f"must be a `peft.LoraConfig`, got a `{type(config).__name__}`"):
            check_lora_config(config, unet)

    def test_layers_of_its_own(self, unet):
        """A file does not name them."""
        config = lora()
        config._register_custom_module({torch.nn.Linear: torch.nn.Linear})
        with pytest.raises(ValueError, match="_register_custom_module"):
            check_lora_config(config, unet)

    def test_a_setting_that_nobody_knows(self, unet, monkeypatch):
        """A field of a newer peft is refused unless it is at its default."""
        monkeypatch.delitem(REFUSED_FIELDS, "use_qalora")
        check_lora_config(lora(), unet)
        with pytest.raises(ValueError, match="`use_qalora=True`, which is a setting that this library does not know"):
            check_lora_config(lora(use_qalora=True), unet)

    @pytest.mark.parametrize("what", ["bias", "modules_to_save"])
    def test_they_would_move_the_reference(self, what):
        """What is refused is wrong indeed: with the adapter off, the trained model is not the base."""
        pipeline = tiny.sd_pipeline()
        base = predict(tiny.sd_pipeline().unet)
        pipeline.unet.requires_grad_(False)
        model = get_peft_model(pipeline.unet, lora(**{"bias": "all"} if what == "bias" else {what: ["conv_in"]}))
        move(model)
        assert (predict(model, adapters=False) - base).abs().max() > 0.01


class TestLoaded:
    @pytest.mark.parametrize("init", [False, "eva", "orthogonal", "gaussian", "mica"])
    def test_the_start_does_not_matter(self, unet, init):
        """Weights that are loaded replace any start that leaves the base alone, and the copy has the plain one."""
        config = lora(init_lora_weights=init, inference_mode=True)
        checked = check_lora_config(config, unet, "`expert`", loaded=True)
        assert checked.init_lora_weights is True and checked.eva_config is None
        assert config.init_lora_weights == init

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_a_start_that_changes_the_base(self, unet, init):
        """Such a LoRA belongs to a base from which it took a part out."""
        with pytest.raises(ValueError, match=f"`expert` has `init_lora_weights='{init}'`.*Convert it to a plain LoRA"):
            check_lora_config(lora(init_lora_weights=init), unet, "`expert`", loaded=True)

    @pytest.mark.parametrize("settings", [{"bias": "all"}, {"modules_to_save": ["conv_in"]}, {"fan_in_fan_out": True}])
    def test_the_same_care(self, unet, settings):
        """What is refused for training is refused for an expert, by its own name."""
        with pytest.raises(ValueError, match=f"`expert` has `{next(iter(settings))}="):
            check_lora_config(lora(**settings), unet, "`expert`", loaded=True)

    def test_names_that_it_does_not_use(self, unet):
        """A trained LoRA may name modules that its base did not have."""
        config = lora(target_modules=["to_q", "add_k_proj"])
        assert check_lora_config(config, unet, "`expert`", loaded=True).target_modules == {
            "to_q",
            "add_k_proj",
        }

    def test_beside_an_adapter(self):
        """Names are those of the base where the model has adapters already."""
        model = adapted(tiny.sd_pipeline(), lora())
        check_lora_config(lora(target_modules=["to_q", "conv1"]), model, "`expert`", loaded=True)
        check_lora_config(lora(target_modules=r"down_blocks.*to_q"), model)
        with pytest.raises(ValueError, match="leaves no module of the `UNet2DConditionModel`"):
            check_lora_config(lora(target_modules=["base_layer"]), model)

    def test_dora_does_not_mix(self):
        """A DoRA cannot share a batch with other adapters: peft says so in the first step, we before it."""
        check_mixes(lora(), "`expert`")
        with pytest.raises(ValueError, match="`expert` is a DoRA"):
            check_mixes(lora(use_dora=True), "`expert`")


class TestNets:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_base_that_is_left_alone(self, dtype):
        """A plain LoRA changes no bit of the base, and its own weights do not count."""
        unet = tiny.sd_pipeline().unet.to(dtype)
        before = base_checksums(unet)
        model = get_peft_model(unet, lora(target_modules=["to_q", "conv1"]))
        check_adapters_off(model, before)
        move(model)
        check_adapters_off(model, before)

    @pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"kasa_config": KasaConfig()}])
    def test_a_base_that_is_changed(self, settings):
        """Peft changes the base under some settings: found whatever they are called."""
        unet = tiny.sd_pipeline().unet
        before = base_checksums(unet)
        with pytest.raises(ValueError, match="changed .* tensors of the base"):
            check_adapters_off(get_peft_model(unet, lora(**settings)), before)

    def test_a_single_bit(self):
        """The smallest change of one weight is found."""
        model = get_peft_model(tiny.sd_pipeline().unet, lora())
        before = base_checksums(model)
        weight = model.base_model.model.conv_in.weight.data
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
        with pytest.raises(ValueError, match="changed 1 tensors of the base, such as 'conv_in.weight'"):
            check_adapters_off(model, before)

    @pytest.mark.parametrize("settings", [{"bias": "all"}, {"modules_to_save": ["conv_in"]}])
    def test_more_than_a_lora_is_trained(self, settings):
        """Weights of the base among what is trained are found whatever the setting is called."""
        unet = tiny.sd_pipeline().unet.requires_grad_(False)
        with pytest.raises(ValueError, match="weights of the base would be trained beside the LoRA"):
            check_trainable(get_peft_model(unet, lora(**settings)))

    def test_nothing_is_trained(self):
        """A frozen LoRA is an error."""
        with pytest.raises(ValueError, match="No weight of the LoRA is trained"):
            check_trainable(get_peft_model(tiny.sd_pipeline().unet, lora(inference_mode=True)))


class TestPuttingIn:
    def test_into_an_adapter(self):
        """The adapter then has these weights and predicts the same."""
        saved = adapted(tiny.sd_pipeline(), lora())
        move(saved)
        model = adapted(tiny.sd_pipeline(), lora())
        model.add_adapter("expert", lora())
        load_lora_into(model, get_peft_model_state_dict(saved), "`expert`", "expert")
        model.set_adapter("expert")
        assert torch.equal(predict(model), predict(saved))

    @pytest.mark.parametrize(
        ("theirs", "problem"),
        [
            ({"target_modules": ["to_q", "conv1"]}, "tensors, such as '.*conv1.* that the model has not"),
            ({"target_modules": ["to_k"]}, "lacks .*to_q"),
            ({"r": 2}, r"has '.*to_q.lora_A.weight' of shape \(2, 8\) for \(4, 8\)"),
            ({"target_modules": ["to_q"], "lora_bias": True}, "has .*lora_B.bias' that the model has not"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_other_weights(self, theirs, problem):
        """Names and shapes must be the adapter's; else the message says which are not, and nothing is changed."""
        weights = get_peft_model_state_dict(get_peft_model(tiny.sd_pipeline().unet, lora(**theirs)))
        model = adapted(tiny.sd_pipeline(), lora(target_modules=["to_q"]))
        before = {name: weight.clone() for name, weight in get_peft_model_state_dict(model).items()}
        with pytest.raises(ValueError, match=f"The checkpoint out does not fit the model: it .*{problem}"):
            load_lora_into(model, weights, "The checkpoint out")
        after = get_peft_model_state_dict(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
