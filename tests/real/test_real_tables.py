"""Embeddings of real crops as tables of another tool: the same store but for its name, the same ridge head."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import affcache
from affcache.store.reading import EmbeddingStore
from tests.conftest import REAL

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="shared/real is not beside the checkout"),
]


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_table_trains_as_the_store_it_was_made_of(real_store: Path, tmp_path: Path, kind: str) -> None:
    exported = affcache.export_embeddings(store=real_store, format="parquet", out=tmp_path / "faces.parquet").out
    rows = pyarrow.parquet.read_table(exported).drop_columns(["status"]).replace_schema_metadata(None)
    rows = rows.take(np.random.default_rng(0).permutation(len(rows)))
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(rows, path)
    else:
        embeddings = np.stack(rows["embedding"].to_numpy())
        np.savez(path, video=np.array(rows["video"].to_pylist()), frame=rows["frame_number"], embedding=embeddings)
    affcache.import_embeddings(sources=path, store=tmp_path / "x.h5", name="cnn")
    original, table = EmbeddingStore.open(real_store), EmbeddingStore.open(tmp_path / "x.h5")
    np.testing.assert_array_equal(table.features, original.features)
    recipe = {"task": "expr", "head": "ridge", "class_weights": "balanced", "annotations": REAL / "annotations"}
    ours, theirs = (
        affcache.fit(store=store.path, run=tmp_path / store.path.stem, **recipe) for store in (original, table)
    )
    assert (ours.value, ours.best_epoch) == (theirs.value, theirs.best_epoch)
    said = affcache.predict(inputs=(table.path,), run=(tmp_path / "x",), out=tmp_path / "said.csv")
    back = affcache.import_embeddings(
        sources=said.out, store=tmp_path / "said.h5", name="said", columns="expr_*", missing="drop"
    )
    assert (back.rows, back.width, back.videos) == (4103, 8, 76)
