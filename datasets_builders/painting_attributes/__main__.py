# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Builds a dataset for `AttributeSFTTrainer` and `ComplexPOTrainer` from the annotations of
`trl-diffusion annotate-attributes`.

```bash
python -m datasets_builders.painting_attributes \
    --dataset_name user/paintings \
    --annotations_dir annotations \
    --criteria painting \
    --output_dir painting-attributes
```
"""

from datasets_builders.common import main, make_parser
from datasets_builders.painting_attributes import PaintingAttributes


if __name__ == "__main__":
    parser = make_parser("painting_attributes", PaintingAttributes.DEFAULT_CONFIG_NAME)
    parser.add_argument(
        "--criteria",
        default="painting",
        help="The criteria tree of the annotations: a YAML file, or the name of a shipped tree.",
    )
    args = parser.parse_args()
    main(PaintingAttributes, args, args.criteria)
