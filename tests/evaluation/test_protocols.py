# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import fields

import pytest
import yaml

from trl_diffusion.evaluation.protocols import SETTINGS, Protocol, load_protocol, shipped_protocols


class TestShipped:
    def test_names(self):
        """The package contains the protocols of the papers."""
        assert shipped_protocols() == ["cpo_sdxl", "iapo_sd15", "iapo_sdxl"]

    @pytest.mark.parametrize("name", shipped_protocols())
    def test_they_load(self, name):
        """Each protocol has its own name, the source of its settings, and the list of unknown ones."""
        protocol = load_protocol(name)
        assert protocol.name == name and protocol.source and set(protocol.unknown) <= set(SETTINGS)

    def test_what_diffusion_dpo_draws_with(self):
        """50 steps, guidance 7.5 for SD1.5 and 5 for SDXL, seed 0, one image per prompt, the model's own scheduler and
        size."""
        sd, sdxl = load_protocol("iapo_sd15"), load_protocol("iapo_sdxl")
        assert (sd.guidance_scale, sdxl.guidance_scale) == (7.5, 5.0)
        for protocol in (sd, sdxl):
            assert (protocol.num_inference_steps, protocol.seed, protocol.images_per_prompt) == (50, 0, 1)
            assert (protocol.scheduler, protocol.height, protocol.width) == (None, None, None)


class TestFiles:
    def write(self, path, **settings) -> str:
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return str(path)

    def test_all_keys(self, tmp_path):
        """A file can set every setting."""
        settings = {
            "name": "mine",
            "num_inference_steps": 20,
            "guidance_scale": 5,
            "scheduler": "DDIMScheduler",
            "height": 512,
            "width": 768,
            "images_per_prompt": 4,
            "seed": -1,
            "max_sequence_length": 128,
            "true_cfg_scale": 2.5,
            "unknown": ["seed"],
            "source": "a paper",
        }
        assert set(settings) == {field.name for field in fields(Protocol)}
        protocol = load_protocol(self.write(tmp_path / "x.yaml", **settings))
        assert protocol == Protocol(**settings | {"unknown": ("seed",)})

    def test_what_is_left_out(self, tmp_path):
        """Other settings are defaults, and the default name is that of the file."""
        protocol = load_protocol(self.write(tmp_path / "mine.yaml", seed=3))
        assert protocol == Protocol(name="mine", seed=3)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("steps: 3", "x.yaml has the unknown key steps; the keys are name, num_inference_steps, guidance_scale"),
            ("- seed", "x.yaml must be a mapping"),
            ("", "x.yaml must be a mapping"),
            ("seed: [", "x.yaml is not valid YAML"),
            (
                "num_inference_steps: 0",
                "x.yaml: `num_inference_steps` of the protocol must be a whole number .* got 0",
            ),
            ("num_inference_steps: 2.5", "`num_inference_steps` .* got 2.5"),
            ("images_per_prompt: null", "`images_per_prompt` .* got None"),
            ("height: -1", "`height` .* got -1"),
            ("seed: one", "`seed` .* got 'one'"),
            ("guidance_scale: high", "`guidance_scale` .* got 'high'"),
            ("true_cfg_scale: '2'", "`true_cfg_scale` of the protocol must be a number, got '2'"),
            ("max_sequence_length: 0", "`max_sequence_length` .* got 0"),
            ("guidance_scale: .nan", "`guidance_scale` .* got nan"),
            ("name: [a]", "`name` of the protocol must be a text, got"),
            ("unknown: 5", "`unknown` of the protocol must be a list of settings, got 5"),
            ("unknown: [{a: b}]", "`unknown` of the protocol lists .*; the settings are"),
            ("seed: !!python/object/apply:os.getcwd []", "x.yaml is not valid YAML: .*is not read"),
            ("a: &a [*a]", "x.yaml is not valid YAML: .*it holds itself"),
            ("scheduler: Euler", "must be a scheduler of diffusers, such as 'DDIMScheduler', got 'Euler'"),
            ("scheduler: UNet2DConditionModel", "must be a scheduler of diffusers"),
            ("unknown: [steps]", "`unknown` of the protocol lists steps; the settings are num_inference_steps"),
        ],
    )
    def test_mistakes(self, tmp_path, content, message):
        """A mistake raises a ValueError with the file, the key and valid values."""
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_protocol(tmp_path / "x.yaml")

    def test_no_such_protocol(self):
        """The message names the existing ones."""
        with pytest.raises(
            ValueError, match="no protocol 'iapo'. Choose one of cpo_sdxl, iapo_sd15, iapo_sdxl, or a YAML file"
        ):
            load_protocol("iapo")


class TestFlags:
    def test_flags_win(self):
        """Explicit settings override the protocol, are added to its name, and are no longer unknown."""
        protocol = load_protocol("iapo_sd15", num_inference_steps=5, seed=0)
        assert protocol.num_inference_steps == 5 and protocol.guidance_scale == 7.5
        assert protocol.name == "iapo_sd15, num_inference_steps=5"
        assert set(load_protocol("iapo_sd15").unknown) - set(protocol.unknown) == {"num_inference_steps", "seed"}

    def test_flags_alone(self):
        """Without a protocol, the other settings are defaults."""
        protocol = load_protocol(
            guidance_scale=2.0, height=64, width=32, images_per_prompt=2, scheduler="PNDMScheduler"
        )
        assert protocol == Protocol(
            guidance_scale=2.0, height=64, width=32, images_per_prompt=2, scheduler="PNDMScheduler"
        )
        assert load_protocol() == Protocol()

    def test_every_setting_has_a_flag(self):
        """Every setting of a protocol has a flag."""
        other = dict(zip(SETTINGS, (3, 1.5, "DDIMScheduler", 8, 16, 2, 9, 64, 3.0), strict=True))
        protocol = load_protocol("cpo_sdxl", **other)
        assert {name: getattr(protocol, name) for name in SETTINGS} == other and protocol.unknown == ()

    def test_flags_are_checked(self):
        """An invalid flag raises a ValueError."""
        with pytest.raises(ValueError, match="`images_per_prompt` .* got 0"):
            load_protocol("iapo_sd15", images_per_prompt=0)
