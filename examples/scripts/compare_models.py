# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation]",
# ]
# ///

"""
Compares a base, a model that was trained on it, and one that was trained alike without what the method adds, from the same prompts and
noise, and pushes images, scores and report to the Hub as a dataset.

```bash
python examples/scripts/compare_models.py \
    --base_model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --model sd15-iapo-lora --arm sd15-dpo-lora \
    --prompts parti --protocol iapo_sd15 \
    --output_dir evaluation --push_to_hub user/sd15-iapo-evaluation
trl-diffusion model-card sd15-iapo-lora --evaluation evaluation --push_to_hub
```

The arm shows what the method itself does, beside what any training on the same data does. For IAPO it is the same command with
`--w_neg 1`, which is Diffusion-DPO; for CPO it is fine-tuning by `attribute-sft`. The second command writes the results into the
model's card. If it is stopped, the same command continues.

The command `trl-diffusion evaluate` does the same, with all metrics and any number of models. Use this file if you want to change
something.
"""

import argparse
from functools import partial
from importlib import import_module

from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import load_protocol
from trl_diffusion.evaluation.push import push_evaluation
from trl_diffusion.evaluation.run import evaluate_models
from trl_diffusion.scripts.evaluate_models import SCORERS, check_push


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--base_model", required=True, help="Hub id or folder of the base.")
    parser.add_argument("--model", required=True, help="Hub id or folder of the trained model.")
    parser.add_argument(
        "--arm", required=True, help="... of the one that was trained alike without what the method adds."
    )
    parser.add_argument("--prompts", default="parti", help="`parti`, `hpdv2`, `pickapic`, a file, or a dataset.")
    parser.add_argument("--num_prompts", type=int, help="Use only so many, taken at equal distances.")
    parser.add_argument("--protocol", help="How to sample: a name such as `iapo_sd15`, or a YAML file.")
    parser.add_argument("--metrics", nargs="+", default=["pickscore", "hpsv2", "clip_score"], choices=SCORERS)
    parser.add_argument("--output_dir", default="evaluation", help="Folder for images, scores and report.")
    parser.add_argument("--use_cpu", action="store_true", help="Use the CPU, even if there is a GPU.")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="Repository for the results.")
    parser.add_argument("--private", action="store_true", help="Make the repository private if it is new.")
    parser.add_argument("--hub_revision", help="Branch to push to.")
    parser.add_argument("--hub_token", help="Token for the push. Defaults to that of `hf auth login` or HF_TOKEN.")
    args = parser.parse_args()
    if args.push_to_hub:
        check_push(args.push_to_hub, args.hub_token)

    device = "cpu" if args.use_cpu else None
    scorers = {
        name: partial(getattr(import_module(f"trl_diffusion.metrics.{name}"), SCORERS[name]), device=device)
        for name in args.metrics
    }
    models = [resolve_model("base", args.base_model)]  # the baseline of the win rates
    models += [
        resolve_model(name, where, args.base_model) for name, where in (("arm", args.arm), ("model", args.model))
    ]
    prompts, protocol = load_prompts(args.prompts, args.num_prompts), load_protocol(args.protocol)
    summary = evaluate_models(models, prompts, protocol, scorers, args.output_dir, use_cpu=args.use_cpu)

    if summary is not None:  # the first of several processes
        for name, scores in summary["scores"].items():
            print(name, {metric: round(score["mean"], 4) for metric, score in scores.items()})
        if args.push_to_hub:
            address = push_evaluation(
                args.output_dir, args.push_to_hub, args.private or None, args.hub_revision, args.hub_token
            )
            print(f"Pushed to {address}.")
