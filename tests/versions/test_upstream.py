# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import json

import transformers
import trl
from trl.trainer.base_trainer import _BaseTrainer

from trl_diffusion import DiffusionKTOTrainer

from .upstream import FILE, changes, recorded


def test_what_is_used_of_private_parts_is_what_it_was():
    """Says what changed in TRL's private base, and in the methods of the Trainer that are overridden or called here."""
    before = json.loads(FILE.read_text(encoding="utf-8"))
    was = ", ".join(f"{name} {version}" for name, version in before["versions"].items())
    lines = changes(before, recorded())
    assert not lines, (
        f"With trl {trl.__version__} and transformers {transformers.__version__}, in place of {was}:\n- "
        + "\n- ".join(lines)
        + "\nLook at each in trl_diffusion/trainer, mend what it breaks, then record it (tests/versions/upstream.py says how)."
    )


def test_a_change_is_told():
    """An argument more, a method that is gone, a new one and other code are each told by name."""
    before = recorded()
    now = copy.deepcopy(before)
    now["overridden"]["compute_loss"] += ", more=None"
    del now["called"]["_save_rng_state"]
    now["code"]["_BaseTrainer._new"] = "0"
    now["code"]["_BaseTrainer.create_model_card"] = "0"
    lines = changes(before, now)
    assert len(lines) == 4
    for told in (
        "`compute_loss`, which is overridden here, takes other arguments: (self, model, inputs",
        "`_save_rng_state` is gone",
        "`_BaseTrainer._new` is new",
        "`_BaseTrainer.create_model_card` has other code",
    ):
        assert any(line.startswith(told) for line in lines), lines


def test_everything_that_is_overridden_is_looked_at():
    """What the loop rests on is among what is kept, and what a single trainer defines again."""
    kept = recorded()["overridden"]
    assert {"compute_loss", "_save", "_save_checkpoint", "_load_from_checkpoint", "create_model_card"} <= kept.keys()
    assert "__post_init__" in kept
    own = [name for name in vars(DiffusionKTOTrainer) if hasattr(_BaseTrainer, name) and not name.startswith("__")]
    assert {"get_batch_samples", "evaluation_loop", "log"} <= set(own)
    assert all(name in kept for name in own if callable(getattr(_BaseTrainer, name)))
