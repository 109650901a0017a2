"""The pages as HTML, from what the service knows.

Templates escape what they are given. Only drawings that are made here pass unescaped.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from cachetools import LRUCache
from markupsafe import Markup

from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.damage import FoundDamage
from cache_service.api.http.service import Service
from cache_service.api.page.activity import activity, event_document, live_figures
from cache_service.api.page.drawing import Cell, cell_map, coverage_picture, scale_bar
from cache_service.api.page.explorer import Explored, ImageAccess, explore
from cache_service.api.page.finder import WAYS, find, random_row
from cache_service.api.page.formatting import count, fine_percent, moment, percent, prose, safe
from cache_service.api.page.images import ImageRenderer
from cache_service.api.page.overview import CacheCard, Coverage, cache_card, overview
from cache_service.api.page.row_figures import (
    CellFigures,
    Commits,
    first_recorded,
    neighbor_seeds,
)
from cache_service.api.page.search import Scan, scan_rows
from cache_service.api.page.visit import Visit
from cache_service.errors import ConfigError, CorruptError, KdCacheError, RowsNotBuiltError
from cache_service.format.seeds import MAX_SEED
from cache_service.format.spec import CacheSpec
from cache_service.human_format import human_bytes
from cache_service.rows.reader import Cache

WAIT_S = 8.0
"""How long a page waits for its images. Without them it is sent, and loads itself again."""

RELOAD_S = 2
"""Seconds until a page without its images loads itself again."""

MAX_EVENTS = 64
"""Caches whose events are shared by the pages that are open."""

MAX_SCANS = 8
"""Searches whose rows are kept: another way through the same rows costs nothing."""

SNAPSHOT_S = 0.9
"""Age up to which all open pages share the figures of builds and traffic."""

LOCAL = Visit()
"""A visit to a server at its default address, for callers that have no request."""

HEADINGS = {
    "not_a_cache": "Not found",
    "rows_not_built": "Not recorded yet",
    "config": "Invalid request",
    "corrupt": "Damage",
    "storage": "The storage cannot be read",
}
"""Of a page that says why there is no other, by the code of the error."""

TONES = {"running": "busy", "done": "good", "failed": "bad"}
"""CSS class of a build's state, if it has one."""

MEDIA_TYPES = {
    "icon.svg": "image/svg+xml",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}


class StaticFile(NamedTuple):
    """One file of the pages."""

    content: bytes
    media_type: str
    etag: str


@lru_cache(maxsize=16)
def static_file(name: str) -> StaticFile | None:
    """The file of that name, from the installed package; None if the pages have no such file."""
    media_type = MEDIA_TYPES.get(name)
    if media_type is None:
        return None
    content = resources.files(__package__).joinpath("static", name).read_bytes()
    return StaticFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"')


class Page(NamedTuple):
    """One answer.

    Attributes:
        reload_s: when it loads itself again; None if it is complete.
        location: another page to go to instead; empty for none.
    """

    html: str
    status: int = 200
    reload_s: int | None = None
    location: str = ""


class Pages:
    """Renders every page of a server; closed with it.

    Attributes:
        login: whether visitors sign in, and so may sign out.
    """

    def __init__(
        self,
        service: Service,
        builds: Builds | None,
        *,
        renderer: ImageRenderer | None = None,
        wait_s: float = WAIT_S,
    ) -> None:
        self.login = bool(service.config.tokens)
        self._service = service
        self._builds = builds
        self._access = ImageAccess(
            _listed_datasets(service),
            is_private=not self.login,
            renderer=renderer or ImageRenderer(),
            wait_s=wait_s,
        )
        self._environment = _environment()
        self._lock, self._scanning = threading.Lock(), threading.Lock()
        self._scans: LRUCache[tuple[Any, ...], Scan] = LRUCache(MAX_SCANS)
        self._events: LRUCache[str, tuple[float, dict[str, Any]]] = LRUCache(MAX_EVENTS)

    def close(self) -> None:
        """End the process that renders images."""
        self._access.renderer.close()

    def overview(self, visit: Visit = LOCAL) -> Page:
        """All caches, builds and traffic."""
        page = overview(self._service, self._builds)
        now = page.activity
        return self._page("overview.html", visit, page=page, now=now, figures=live_figures(now))

    def cache(self, name: str, visit: Visit = LOCAL) -> Page:
        """One cache in full."""
        card = cache_card(self._service.catalog, name, rows=60, columns=96)
        now = activity(self._service, self._builds, cache=name)
        return self._page(
            "cache.html",
            visit,
            card=card,
            first_seed=next(iter(self._service.catalog.open(name).commits()), 0),
            now=now,
            figures=live_figures(now, recorded=_recorded(card)),
        )

    def explore(self, name: str, seed: str, sample: str, visit: Visit = LOCAL) -> Page:
        """One sample under one seed, as they were typed; empty for the first recorded one."""
        opened = self._service.catalog.open(name)
        cache, commits = opened.cache, opened.commits()
        spec = cache.spec
        first = first_recorded(spec, commits)
        if first is None:
            raise RowsNotBuiltError(
                f"nothing of {name} is recorded yet.",
                hint="Its samples can be shown when the first shard is committed.",
            )
        seed_number = _number("seed", seed, first[0])
        sample_number = _number("sample", sample, 0 if seed else first[1])
        explored: Explored | None = None
        refusal: KdCacheError | None = None
        try:
            explored = explore(
                cache,
                seed_number,
                sample_number,
                commits=commits,
                access=self._access,
            )
            damage = explored.damage
        except RowsNotBuiltError as error:
            refusal, damage = error, None
        except CorruptError as error:
            refusal = damage = error
        if damage is not None:
            self._service.catalog.damage.note(name, damage)
        last = spec.dataset.num_samples - 1
        before, after = neighbor_seeds(commits, seed_number)
        page = self._page(
            "explore.html",
            visit,
            explored=explored,
            refusal=refusal,
            damage=damage,
            name=name,
            seed=seed_number,
            sample=sample_number,
            num_seeds=cache.num_seeds(),
            num_samples=last + 1,
            num_cells=spec.num_cells,
            size=spec.recipe.size,
            topk=spec.codec.num_kept,
            previous_sample=min(sample_number - 1, last) if sample_number > 0 else None,
            next_sample=sample_number + 1 if sample_number < last else None,
            previous_seed=before,
            next_seed=after,
        )
        is_pending = explored is not None and explored.note is not None and explored.note.is_pending
        return page._replace(
            status=200 if refusal is None else refusal.http_status,
            reload_s=RELOAD_S if is_pending else None,
        )

    def find(
        self, name: str, by: str, seed: str, start: str, wanted: str, visit: Visit = LOCAL
    ) -> Page:
        """Samples worth a look, as it was typed; `by` is `random` or one of `finder.WAYS`.

        Raises:
            ConfigError: what was typed is no number, no way or no class.
            RowsNotBuiltError: nothing of the seed is recorded.
        """
        opened = self._service.catalog.open(name)
        cache, commits = opened.cache, opened.commits()
        seed_number = _number("seed", seed, next(iter(commits), 0))
        first = _number("from", start, 0)
        if not commits.get(seed_number):
            raise RowsNotBuiltError(
                f"nothing of seed {seed_number} of {name} is recorded yet.",
                hint="Its samples can be found when its first shard is committed.",
            )
        if by == "random":
            chosen, sample = random_row(cache, commits, seed_number if seed else None)
            target = visit.link("caches", name, "explore", seed=chosen, sample=sample)
            return Page("", 303, location=target)
        if by not in WAYS:
            raise ConfigError(f"by={by[:40]!r} is none of random, {', '.join(WAYS)}.")
        scan = self._scan(cache, commits, seed_number, first)
        if scan.damage is not None:
            self._service.catalog.damage.note(name, scan.damage)
        found = find(cache, scan, seed_number, by=by, wanted=wanted, access=self._access)
        page = self._page(
            "find.html",
            visit,
            found=found,
            name=name,
            by=by,
            seed=seed_number,
            start=first,
            wanted=wanted,
            recorded=_recorded_rows(cache.spec, commits[seed_number]),
        )
        is_pending = found.note is not None and found.note.is_pending
        return page._replace(reload_s=RELOAD_S if is_pending else None)

    def _scan(self, cache: Cache, commits: Commits, seed: int, start: int) -> Scan:
        """One scan at a time: more of them would only slow down those who read rows."""
        key = (cache.fingerprint, seed, start, len(commits[seed]))
        with self._scanning:
            if key not in self._scans:
                self._scans[key] = scan_rows(cache, commits, seed, start)
            return self._scans[key]

    def sign_in(
        self, *, next_path: str, message: str = "", status: int = 200, visit: Visit = LOCAL
    ) -> Page:
        """The form that asks for a token."""
        style = static_file("page.css")
        assert style is not None
        html = self._environment.get_template("login.html").render(
            style=style.content.decode(), next=next_path, message=message, link=visit.link
        )
        return Page(html, status)

    def refused(self, refusal: KdCacheError, visit: Visit = LOCAL, *, name: str = "") -> Page:
        """The reason why there is no page, of the cache of that name if one was requested."""
        status = refusal.http_status
        if isinstance(refusal, CorruptError) and name:
            self._service.catalog.damage.note(name, refusal)
        page = self._page(
            "refused.html",
            visit,
            status=status,
            name=name,
            heading=HEADINGS.get(refusal.code, "Refused"),
            is_damage=isinstance(refusal, CorruptError),
            message=refusal.message,
            hint=refusal.hint,
        )
        return page._replace(status=status)

    def event(self, cache: str = "") -> dict[str, Any]:
        """Figures of builds and traffic, at most SNAPSHOT_S old.

        Args:
            cache: name of a cache: only its builds, and what of it is recorded; empty for all.

        Raises:
            NotACacheError, CorruptError: the cache cannot be opened.
            StorageError: the queue or the cache cannot be read.
        """
        with self._lock:
            taken, event = self._events.get(cache, (float("-inf"), {}))
            if time.monotonic() - taken > SNAPSHOT_S:
                now, recorded = activity(self._service, self._builds, cache=cache), None
                if cache:
                    recorded = _recorded(cache_card(self._service.catalog, cache))
                event = event_document(now, live_figures(now, recorded=recorded))
                self._events[cache] = (time.monotonic(), event)
            return event

    def _page(self, template: str, visit: Visit, **values: Any) -> Page:
        html = self._environment.get_template(template).render(
            login=self.login, visit=visit, link=visit.link, **values
        )
        return Page(html)


def _listed_datasets(service: Service) -> tuple[Mapping[str, Any], ...]:
    """The datasets of the serve file: those for the pages, and those for builds."""
    config = service.config
    listed = [*config.datasets.values()]
    if config.builds is not None:
        listed += config.builds.datasets.values()
    return tuple(dataset.model_dump(mode="json") for dataset in listed)


def _recorded(card: CacheCard) -> tuple[int, int, FoundDamage | None]:
    """What changes on the page of a cache while it is recorded."""
    return card.rows, card.planned_rows, card.damage


def _recorded_rows(spec: CacheSpec, shards: Sequence[int]) -> int:
    ranges = [spec.shard_range(shard) for shard in shards]
    return sum(stop - start for start, stop in ranges)


def _number(what: str, text: str, default: int) -> int:
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and int(text[:12]) <= MAX_SEED):
        raise ConfigError(f"{what}={text[:40]!r} is not a number from 0 to {MAX_SEED}.")
    return int(text)


def _environment() -> jinja2.Environment:
    """The templates of this package, with the functions that they call."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cache_service.api.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=human_bytes,
        count=count,
        fine_percent=fine_percent,
        moment=moment,
        percent=percent,
        prose=prose,
        coverage=_coverage_picture,
    )
    environment.globals.update(tones=TONES, ways=WAYS, cell_map=_cell_map, scale_bar=_scale_bar)
    return environment


def _coverage_picture(recorded: Coverage) -> Markup:
    return safe(coverage_picture(recorded.levels_YX, f"{recorded.summary}."))


def _scale_bar(explored: Explored) -> Markup:
    """The colors of the maps with the probabilities at their ends; nothing for a single cell."""
    low, high = explored.figures.target_range
    if len(explored.figures.grids) == 1:
        return safe("")
    words = f"Color scale: probability of {explored.name(explored.figures.target)} from "
    ends = f"{fine_percent(low)}, dark, to {fine_percent(high)}, bright"
    return safe(scale_bar(fine_percent(low), fine_percent(high), words + ends))


def _cell_map(explored: Explored, scale: int, figures: list[CellFigures], under: Markup) -> Markup:
    """The predictions from the cells of one scale, over the view."""
    target = explored.name(explored.figures.target)
    low, high = explored.figures.target_range
    marks = {label: mark for mark, (label, _) in enumerate(explored.figures.legend, start=1)}
    kinds = {True: ", complementary", False: ", consistent", None: ""}
    cells = [
        Cell(
            fraction=(cell.target_probability - low) / (high - low) if high > low else 0.5,
            mark=str(marks[cell.top]),
            value=percent(cell.target_probability),
            complementary=cell.complementary,
            description=(
                f"row {cell.row + 1} column {cell.column + 1}: {explored.name(cell.top)} "
                f"{percent(cell.top_probability)}, {target} "
                f"{fine_percent(cell.target_probability)}{kinds[cell.complementary]}"
            ),
        )
        for cell in figures
    ]
    label = f"Cells of scale {scale}. {'; '.join(cell.description for cell in cells)}."
    # As plain text: adding text to `Markup` would escape it.
    return safe(cell_map(scale, cells, under=str(under), label=label))
