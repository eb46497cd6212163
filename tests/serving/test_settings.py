"""The environment variables that tell a server about steering."""

from dataclasses import replace
from pathlib import Path

import pytest
from hones_serving.settings import Settings
from hypothesis import given
from hypothesis import strategies as st

from hones_steer.errors import DataError

PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).map(Path)
SETTINGS = st.builds(
    Settings,
    profiles=PATHS,
    max_profiles=st.none() | st.integers(1, 999_999),
    routing=st.none() | PATHS,
    allow_updates=st.booleans(),
    allow_untested=st.booleans(),
    playground=st.booleans(),
    max_body_mb=st.integers(1, 999_999),
    max_expert_tables=st.none() | st.integers(1, 999_999),
    state=st.none() | PATHS,
)


@pytest.mark.parametrize("environ", [{}, {"HONES_PROFILES": ""}, {"HONES_PROFILES": "", "HONES_MAX_PROFILES": "x"}])
def test_without_profiles_there_is_nothing_to_do(environ: dict[str, str]) -> None:
    assert Settings.from_env(environ) is None


def test_all_that_can_be_said() -> None:
    environ = {
        "HONES_PROFILES": "profiles",
        "HONES_MAX_PROFILES": "12",
        "HONES_ROUTING": "routing.yaml",
        "HONES_ALLOW_PROFILE_UPDATES": "1",
        "HONES_ALLOW_UNTESTED": "1",
        "HONES_PLAYGROUND": "1",
        "HONES_MAX_BODY_MB": "3",
        "HONES_MAX_EXPERT_TABLES": "300",
        "HONES_STATE_DIR": "state",
    }
    assert Settings.from_env(environ) == Settings(
        Path("profiles"), 12, Path("routing.yaml"), True, True, True, 3, 300, Path("state")
    )


def test_what_is_not_said_is_off() -> None:
    assert Settings.from_env({"HONES_PROFILES": "profiles"}) == Settings(
        Path("profiles"), None, None, False, False, False, 64, None
    )


def test_a_body_may_have_64_mib_unless_it_is_said() -> None:
    assert Settings(Path("profiles")).max_body == 64 * 2**20
    assert Settings.from_env({"HONES_PROFILES": "p", "HONES_MAX_BODY_MB": "3"}) == Settings(Path("p"), max_body_mb=3)


@given(SETTINGS)
def test_settings_survive_the_environment(settings: Settings) -> None:
    assert Settings.from_env(settings.to_env()) == settings


def test_they_replace_whatever_was_set_before() -> None:
    before = Settings(Path("old"), 3, Path("old.yaml"), allow_updates=True, allow_untested=True, playground=True)
    before = replace(before, max_expert_tables=5)
    after = Settings(Path("new"))
    assert Settings.from_env({**before.to_env(), **after.to_env()}) == after


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HONES_MAX_PROFILES", "0"),
        ("HONES_MAX_PROFILES", "-3"),
        ("HONES_MAX_PROFILES", "1.5"),
        ("HONES_MAX_PROFILES", " 8"),
        ("HONES_MAX_PROFILES", "٣"),
        ("HONES_MAX_PROFILES", "9" * 5000),
        ("HONES_MAX_BODY_MB", "0"),
        ("HONES_MAX_BODY_MB", "64 MB"),
        ("HONES_ALLOW_PROFILE_UPDATES", "yes"),
        ("HONES_ALLOW_UNTESTED", "true"),
        ("HONES_PLAYGROUND", "on"),
        ("HONES_MAX_EXPERT_TABLES", "0"),
    ],
)
def test_a_value_that_means_nothing_is_named(name: str, value: str) -> None:
    with pytest.raises(DataError, match=f"^{name} is '"):
        Settings.from_env({"HONES_PROFILES": "profiles", name: value})
