# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

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
