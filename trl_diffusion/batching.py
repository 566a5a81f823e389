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

"""Lists cut into batches, and work on images spread over the cores."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


CORES = os.cpu_count() or 1  # with more threads than that, they wait for one another


def batched(items: list, size: int) -> Iterator[list]:
    """Cuts a list into lists of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def in_threads(function: Callable, items: Iterable) -> list:
    """Applies a function to all items, side by side: PIL's work on pixels leaves the other cores free."""
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(function, items))
