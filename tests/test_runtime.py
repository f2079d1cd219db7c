import pytest

from lowrank_tune.runtime import ray_session


def test_what_fails_beside_rays_start_is_told_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(True))
    with (
        pytest.raises(ModuleNotFoundError, match="lowrank_tune.nothing"),
        ray_session(meanwhile=["lowrank_tune.nothing"]),
    ):
        pass
    assert ended == [True]
