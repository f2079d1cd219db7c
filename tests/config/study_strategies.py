"""Hypothesis strategies over every study that a file can describe."""

from typing import Any

from hypothesis import strategies as st

from lowrank_tune.config.schema import StudySpec

# What no study file can hold: surrogates and control characters.
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
counts = st.integers(1, 10_000)
fractions = st.floats(0.01, 0.49)
positives = st.floats(1e-300, 1e300)


def axis(values: st.SearchStrategy[Any], *ranges: str) -> st.SearchStrategy[Any]:
    forms = [values, st.lists(values, min_size=1, max_size=4, unique=True)]
    bounds = st.lists(values, min_size=2, max_size=2, unique=True).map(sorted)
    forms += [st.fixed_dictionaries({name: bounds}) for name in ranges]
    return st.one_of(forms)


def optional(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


reals = axis(positives, "uniform", "loguniform")
sources = st.one_of(
    st.fixed_dictionaries({"images": texts}),
    st.fixed_dictionaries(
        {"manifest": texts.map(lambda text: f"{text}x.csv") | st.lists(texts, min_size=1, max_size=2)},
        optional={"image_column": texts, "root": texts},
    ),
    st.fixed_dictionaries({"tensors": texts | st.lists(texts, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"tensors": st.fixed_dictionaries({"path": texts, "key": texts})}),
    st.fixed_dictionaries({"samples": st.integers(100, 1024)}),
)


in_bytes = st.sampled_from(["val_bytes_at_error", ["val_bytes", "val_error"], ["val_error", "val_bytes"]])
objectives = st.one_of(
    optional(objective=st.sampled_from(["val_residual_ratio", "val_mse", "val_token_cosine"])),
    st.fixed_dictionaries({"objective": in_bytes, "target_error": st.floats(1e-6, 0.99)}),
)


@st.composite
def studies(draw: st.DrawFn) -> StudySpec:
    source = draw(sources)
    features = {
        "source": source,
        **draw(
            optional(
                store_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
                actors=counts | st.just("auto"),
                max_quarantined=st.floats(0, 1),
            )
        ),
    }
    if "tensors" not in source:
        features["encoder"] = {"image_size": 448, **draw(optional(checkpoint=texts))}
    grid = draw(st.booleans())
    scale = axis(positives) if grid else reals
    nested = draw(st.booleans())
    ranks = st.lists(st.integers(1, 256), min_size=1, max_size=3, unique=True)
    families = {
        "sketch": st.just({}),
        "refined": optional(steps=axis(st.integers(1, 8), *([] if grid else ["int"]))),
        "shared": optional(token_transform=axis(st.sampled_from(["none", "dct", "learned"])), lambda_rate=scale),
        **({} if nested else {"direct": optional(lambda_b=scale, lambda_ortho=scale)}),
    }
    space = {
        "rank": {"nested": draw(ranks)} if nested else draw(axis(st.integers(1, 256), *([] if grid else ["int"]))),
        **draw(optional(lr=scale, weight_decay=scale, batch_size=axis(counts, *([] if grid else ["int"])))),
        "families": draw(optional(**families).filter(bool)),
    }
    asked = optional(
        images=counts,
        max_new_tokens=st.integers(1, 512),
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        at=st.lists(st.sampled_from(["factors", "int8", "int4", "coded", "pictures"]), min_size=1, unique=True),
    ).map(lambda own: {"questions": "What is this?", **own})
    method = {"method": "grid"} if grid else draw(optional(method=st.sampled_from(["random", "tpe"]), trials=counts))
    points = st.lists(st.sampled_from(sorted(space["families"])).map(lambda family: {"family": family}), max_size=2)
    method |= draw(optional(first=points | st.fixed_dictionaries({"study": texts}, optional={"best": counts})))
    return StudySpec.model_validate(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", fullmatch=True)),
            "features": features,
            "search": {**method, "space": space},
            **draw(objectives),
            **({} if "tensors" in source else draw(optional(fidelity=asked))),
            **draw(
                optional(
                    seed=st.integers(0, 2**32 - 1),
                    split=optional(validation=fractions | st.integers(1, 10), test=fractions | st.integers(1, 10)),
                    training=optional(epochs=counts, patience=counts),
                    scheduler=optional(
                        kind=st.sampled_from(["asha", "none"]),
                        reduction_factor=st.integers(2, 9),
                        compete_within=st.lists(st.sampled_from(["rank", "family"]), unique=True),
                    ),
                    resources=optional(cpus_per_trial=positives, gpus_per_trial=st.floats(0, 1), max_concurrent=counts)
                    | optional(gpus_per_trial=st.integers(0, 4), workers_per_trial=counts),
                    tracking=optional(
                        uri=texts.filter(lambda text: "@" not in text),
                        experiment=texts,
                        register_as=st.just("decomposer 1.0"),
                    ),
                    report=optional(
                        images=st.just([0]) | st.just([]), channels=counts, confirm_seeds=st.integers(0, 5)
                    ),
                )
            ),
        }
    )
