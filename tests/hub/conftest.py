# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.pointing import forget, point
from tests.hub.stand_in import StandIn


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """
    A stand-in of the Hub that the clients of this process are pointed at, with empty caches. HF_TOKEN is `"hf_user"`, a
    token of `"user"`, who may also write to the repositories of `"org"`. Clients do not sleep before they try again:
    `hub.waits` has the seconds that they would have slept.
    """
    home = tmp_path_factory.mktemp("hub_home")
    with StandIn() as stand_in, pytest.MonkeyPatch.context() as patch:
        stand_in.add_user("user", "hf_user", orgs=("org",))
        point(stand_in, Path(home), "hf_user", patch)
        yield stand_in
        forget()
    assert not stand_in.errors, stand_in.errors[0]
