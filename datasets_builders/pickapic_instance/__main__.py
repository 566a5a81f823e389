# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Builds a dataset for `InstanceDPOTrainer` from the annotations of `trl-diffusion annotate-instances`.

```bash
python -m datasets_builders.pickapic_instance \
    --dataset_name user/pick-a-pic-v2 --dataset_streaming \
    --annotations_dir annotations \
    --output_dir pickapic-instance
```
"""

from datasets_builders.common import main, make_parser
from datasets_builders.pickapic_instance import PickapicInstance


if __name__ == "__main__":
    main(PickapicInstance, make_parser("pickapic_instance", PickapicInstance.DEFAULT_CONFIG_NAME).parse_args())
