"""Whatever a study file holds, `validate` ends in 0 or 2, and each line that it says begins with file:line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lowrank_tune.cli import run

TEXTS = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parents[2].glob("studies/*.yaml"))]
WORDS = sorted(set(re.findall(r"[a-z_]\w+", " ".join(TEXTS))))

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(WORDS),
    st.sampled_from(["1e400", "0x10", "1_000", "~", "<<", "!!python/object:os.system x", "*a", "&a", "2026-01-01"]),
)  # fmt: skip
keys = st.sampled_from(WORDS) | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def paths_in(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(found for key, value in parts for found in paths_in(value, (*path, key)))]


def held(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


@st.composite
def changed_studies(draw: st.DrawFn) -> bytes:
    """A valid study with some of its values replaced, removed, renamed or put elsewhere."""
    content: Any = YAML(typ="safe", pure=True).load(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_in(content)))
        if not path:
            continue
        place, old = held(content, path[:-1]), held(content, path)
        change = draw(st.sampled_from(["value", "remove", "rename", "elsewhere", "wrapped"]))
        if change == "remove":
            del place[path[-1]]
        elif change == "rename" and isinstance(place, dict):
            place[draw(keys)] = place.pop(path[-1])
        elif change == "elsewhere":
            place[path[-1]] = json.loads(json.dumps(held(content, draw(st.sampled_from(paths_in(content))))))
        else:
            place[path[-1]] = [old] if change == "wrapped" else draw(values)
    return json.dumps(content, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def torn_studies(draw: st.DrawFn) -> bytes:
    """A valid study's bytes with a piece of them cut out, repeated or overwritten."""
    data = draw(st.sampled_from(TEXTS)).encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        between = draw(
            st.sampled_from([b"", data[start:end] * 2, b"\xff", b"\x00", b": ", b"- ", b"{", b'"', b"\t", b"#"])
        )
        data = data[:start] + between + data[end:]
    return data


documents = values.map(lambda value: json.dumps(value).encode())


@settings(max_examples=3000, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
@given(content=st.one_of(changed_studies(), torn_studies(), documents, st.binary(max_size=40)))
def test_validate_ends_in_0_or_2_with_lines_of_the_file(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(content)
    capsys.readouterr()
    code = run(["validate", str(file)])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (code, bool(out), bool(lines)) in {(0, True, False), (2, False, True)}, err
    for line in lines:
        assert re.match(rf"{re.escape(str(file))}:\d+: \S|{re.escape(str(file))}: larger", line), line
        assert not re.search("Traceback|defect|Input should be|object at 0x", line)
