"""API keys from a file: who is let in, what a line may be, and what a changed file does."""

from pathlib import Path

import pytest

from app import access
from app.access import ApiKeys
from app.errors import ConfigError, Unauthorized

ONE, TWO = "a" * 16, "b-key_of.another~client/+1="


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "LOOK_SECONDS", 0.0)


def keys(folder: Path, text: str) -> ApiKeys:
    return ApiKeys(written(folder, text))


def written(folder: Path, text: str) -> Path:
    """As kubelet changes a Secret: a link to another file."""
    content = folder / f"content-{len(list(folder.iterdir()))}"
    content.write_text(text)
    link, path = folder / "next", folder / "keys"
    link.symlink_to(content)
    return link.replace(path)


def test_a_key_says_who_asks(tmp_path: Path):
    found = keys(tmp_path, f"# of the shop\nshop:{ONE}\n\n  team.two:{TWO}  \n")
    assert found.name_of(f"Bearer {ONE}") == "shop"
    assert found.name_of(f"bearer  {TWO} ") == "team.two"
    assert found.names == {"shop", "team.two"}


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {ONE}", ONE, f"Bearer {ONE}x", f"Bearer {ONE[:-1]}", "Bearer \udcff"],
)
def test_whoever_has_none_is_refused(tmp_path: Path, header: str | None):
    with pytest.raises(Unauthorized) as caught:
        keys(tmp_path, f"shop:{ONE}").name_of(header)
    assert ONE[:-1] not in str(caught.value)


def test_two_keys_of_one_name_hold_while_one_takes_the_place_of_the_other(tmp_path: Path):
    found = keys(tmp_path, f"shop:{ONE}\nshop:{TWO}")
    assert found.name_of(f"Bearer {ONE}") == found.name_of(f"Bearer {TWO}") == "shop"


def test_a_changed_file_holds_from_then_on(tmp_path: Path):
    found = keys(tmp_path, f"shop:{ONE}")
    written(tmp_path, f"shop:{TWO}")
    assert found.name_of(f"Bearer {TWO}") == "shop"
    with pytest.raises(Unauthorized):
        found.name_of(f"Bearer {ONE}")


@pytest.mark.parametrize("text", ["", "shop:short", "no colon", f"shop:{ONE}\nbroken"])
def test_a_changed_file_that_is_wrong_leaves_the_keys_as_they_were(tmp_path: Path, text: str):
    found = keys(tmp_path, f"shop:{ONE}")
    written(tmp_path, text)
    assert found.name_of(f"Bearer {ONE}") == "shop"


def test_a_file_that_goes_leaves_the_keys_as_they_were(tmp_path: Path):
    found = keys(tmp_path, f"shop:{ONE}")
    (tmp_path / "keys").unlink()
    assert found.name_of(f"Bearer {ONE}") == "shop"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected 1 to 1000 keys, found 0"),
        (f"shop:{ONE}\nsecretwithoutname", "line 2: expected NAME:KEY"),
        ("shop:secret", "line 1: expected NAME:KEY, a key of 16 to 512"),
        ("a shop:" + ONE, "line 1: expected NAME:KEY"),
        ("\n".join(f"c{i}:{i:016}" for i in range(1001)), "expected 1 to 1000 keys, found 1001"),
    ],
)
def test_a_file_that_is_wrong_from_the_start_is_named_and_not_quoted(tmp_path: Path, text: str, reason: str):
    with pytest.raises(ConfigError) as caught:
        keys(tmp_path, text)
    assert str(caught.value).startswith(f"APP_API_KEYS_FILE={tmp_path}/keys: {reason}")
    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ApiKeys(tmp_path / "nowhere")
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read: not UTF-8"):
        ApiKeys(tmp_path / "keys")
