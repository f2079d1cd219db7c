"""StudySpec -> a study file with every default filled in; and the JSON schema for editors."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from lowrank_tune.config.axes import FamiliesSpec, Range, Section
from lowrank_tune.config.schema import FeaturesSpec, StudySpec
from lowrank_tune.config.source import TensorSource


class _Representer(RoundTripRepresenter):
    """Writes `null`, where ruamel's own leaves a value out and a reader in doubt."""


_Representer.add_representer(type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null"))


def render_study(spec: StudySpec) -> str:
    """Write a study as YAML, every key with its meaning above it; `load_study` reads an equal spec from it."""
    yaml = YAML()
    yaml.Representer = _Representer
    # Long texts such as paths stay on one line.
    yaml.width = 2**20
    text = io.StringIO()
    yaml.dump(_mapping(spec, 0), text)
    return text.getvalue()


def study_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12; checks across keys are `load_study`'s alone."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **StudySpec.model_json_schema()}


def _mapping(section: Section, depth: int) -> CommentedMap:
    mapping = CommentedMap()
    for name, field in type(section).model_fields.items():
        if _is_absent(section, name):
            continue
        value = getattr(section, name)
        mapping[name] = _node(value, depth + 1)
        described = field.description or (type(value).__doc__ if isinstance(value, Section) else "") or ""
        mapping.yaml_set_comment_before_after_key(name, before=described.strip(), indent=2 * depth)
    return mapping


def _is_absent(section: Section, name: str) -> bool:
    """Whether a key must be left out: a family not tried, an encoder with nothing to encode."""
    if isinstance(section, FeaturesSpec):
        return name == "encoder" and isinstance(section.source, TensorSource)
    return isinstance(section, FamiliesSpec) and getattr(section, name) is None


def _node(value: Any, depth: int) -> Any:
    if isinstance(value, Section):
        return _mapping(value, depth)
    if not isinstance(value, Range | tuple | dict):
        return value
    mapping = {value.kind: _node(value.values, depth)} if isinstance(value, Range) else value
    own = [_node(each, depth) for each in value] if isinstance(value, tuple) else []
    node: Any = CommentedMap(mapping) if isinstance(mapping, dict) else CommentedSeq(own)
    node.fa.set_flow_style()
    return node
