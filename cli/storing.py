"""The commands around stores and data: import, export, info and verify."""

from typing import Any

import affcache
from affcache.exchange.settings import ExportSettings, ImportSettings
from affcache.settings import ConfigFile, resolve

from .commands import out, run
from .console import ConsoleListener
from .tables import fact_table


def import_(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache import``."""

    def show(result: Any) -> None:
        facts = {
            "store": result.store,
            "rows": f"{result.rows:,}: {result.encoded:,} encoded, {result.unreadable:,} unreadable",
            "videos": f"{result.videos:,}",
            "width": result.width,
            "from": result.imported_from,
        }
        if result.normalised is not None:
            facts["embeddings"] = "of length 1" if result.normalised else "not normalised"
        if result.same_as_exported:
            facts["export"] = "the same rows, to the bit, as the store it was made of"
        out(fact_table(facts), f"next: affcache fit --task expr --store {result.store} --annotations DIR")

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.import_embeddings(resolve(ImportSettings, "import", given, config), listener=listener)

    run(as_json, work, show)


def export(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache export``."""

    def show(result: Any) -> None:
        facts = {
            "out": f"{result.out} ({result.format}, {result.bytes / 1e6:,.1f} MB)",
            "rows": f"{result.rows:,}: {result.encoded:,} encoded, {result.unreadable:,} unreadable",
            "videos": f"{result.videos:,}",
            "width": result.width,
        }
        out(fact_table(facts), f"back: affcache import {result.out} --store FILE")

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        store = {} if "store" in given or "store" in config.of("export") else {"store": config.store}
        return affcache.export_embeddings(
            resolve(ExportSettings, "export", {**given, **store}, config), listener=listener
        )

    run(as_json, work, show)


def info(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache info``."""

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.EmbeddingStore.open(given["store"]).summary()

    def show(result: dict[str, Any]) -> None:
        encoder = result.pop("encoder")
        out(fact_table(result), "encoder", fact_table({f"  {name}": value for name, value in encoder.items()}))

    run(as_json, work, show)


def verify(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache verify``."""

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        store = affcache.EmbeddingStore.open(given["store"])
        for checked in (store, *(store.view(name) for name in store.views)):
            checked.verify(lambda done, total: listener.progress(done, total, "block"))
        return {"store": str(store.path), "rows": len(store), "sound": True, "views": store.views, **store.counts}

    def show(result: dict[str, Any]) -> None:
        views = f", in view {', '.join(result['views'])} too" if result["views"] else ""
        out(f"{result['store']} is sound: {result['rows']:,} rows, every block matches its checksum{views}")

    run(as_json, work, show)
