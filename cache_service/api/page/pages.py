"""The pages as HTML, from what the service knows. One instance per server; closed with it."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

from cache_service.api.page import views
from cache_service.api.page.explorer import WAIT_S, explore
from cache_service.api.page.live import event_of, figures_of
from cache_service.api.page.ports import Ports
from cache_service.api.page.renderer import Renderer
from cache_service.api.page.rendering import make_environment
from cache_service.api.page.rows import first_recorded, neighbors_of
from cache_service.api.page.static_files import static_file
from cache_service.errors import ConfigError, KdCacheError, RowsNotBuiltError
from cache_service.format.seeds import MAX_SEED

RELOAD_S = 2
"""Seconds after which a page loads again whose pictures were not drawn in time."""

SNAPSHOT_S = 0.9
"""Age up to which figures are shared by those who watch."""

HEADINGS = {404: "Not found", 422: "Not understood"}


class Page(NamedTuple):
    """One answer. `reload_s` is None where the page is complete."""

    html: str
    status: int = 200
    reload_s: int | None = None


class Pages:
    """Renders every page.

    Attributes:
        login: whether visitors sign in, and so may sign out.
    """

    def __init__(
        self,
        ports: Ports,
        *,
        login: bool,
        renderer: Renderer | None = None,
        wait_s: float = WAIT_S,
    ) -> None:
        self.login = login
        self._wait_s = wait_s
        self._ports = ports
        self._renderer = renderer or Renderer()
        self._environment = make_environment()
        self._lock = threading.Lock()
        self._event: tuple[float, dict[str, Any]] = (float("-inf"), {})

    def close(self) -> None:
        """End the drawing process."""
        self._renderer.close()

    def overview(self) -> Page:
        """All caches, builds and traffic."""
        found = views.overview(self._ports)
        figures = figures_of(found.builds, found.traffic)
        return self._page("overview.html", page=found, figures=figures)

    def cache(self, name: str) -> Page:
        """One cache in full."""
        card = views.card(name, self._ports.open(name), rows=60, columns=96)
        return self._page("cache.html", card=card)

    def explore(self, name: str, seed: str, sample: str) -> Page:
        """One sample under one seed; both as they were typed, empty for the first recorded."""
        cache, commits = self._ports.open(name)
        spec = cache.spec
        first = first_recorded(spec, commits)
        if first is None:
            raise RowsNotBuiltError(
                f"nothing of {name} is recorded yet.",
                hint="It can be looked at when its first shard is committed.",
            )
        chosen = _number("seed", seed, first[0])
        number = _number("sample", sample, 0 if seed else first[1])
        values: dict[str, Any] = {"found": None, "refusal": None}
        try:
            values["found"] = explore(
                cache,
                chosen,
                number,
                commits=commits,
                datasets=self._ports.datasets,
                renderer=self._renderer,
                wait_s=self._wait_s,
            )
        except RowsNotBuiltError as refusal:
            values["refusal"] = refusal
        num_seeds = cache.num_seeds()
        last = spec.dataset.num_samples - 1
        before, after = neighbors_of(commits, chosen)
        return self._page(
            "explore.html",
            **values,
            name=name,
            seed=chosen,
            sample=number,
            num_seeds=num_seeds,
            num_samples=last + 1,
            num_cells=spec.num_cells,
            size=spec.recipe.size,
            topk=spec.codec.num_kept,
            previous_sample=min(number - 1, last) if number > 0 else None,
            next_sample=number + 1 if number < last else None,
            previous_seed=before,
            next_seed=after,
        )

    def sign_in(self, *, next_path: str, message: str = "", status: int = 200) -> Page:
        """The form that asks for a token."""
        style = static_file("page.css")
        assert style is not None
        html = self._environment.get_template("login.html").render(
            style=style.content.decode(), next=next_path, message=message
        )
        return Page(html, status)

    def refused(self, refusal: KdCacheError) -> Page:
        """Why there is no page, for people."""
        status = refusal.http_status
        page = self._page(
            "refused.html",
            status=status,
            heading=HEADINGS.get(status, "Refused"),
            message=refusal.message,
            hint=refusal.hint,
        )
        return page._replace(status=status)

    def event(self) -> dict[str, Any]:
        """Figures of builds and traffic, at most SNAPSHOT_S old."""
        with self._lock:
            taken, event = self._event
            if time.monotonic() - taken > SNAPSHOT_S:
                builds, traffic = self._ports.builds(), self._ports.traffic()
                event = event_of(figures_of(builds, traffic), builds, traffic)
                self._event = (time.monotonic(), event)
            return event

    def _page(self, template: str, **values: Any) -> Page:
        html = self._environment.get_template(template).render(login=self.login, **values)
        refusal, found = values.get("refusal"), values.get("found")
        pending = found is not None and found.note is not None and found.note.again
        return Page(
            html,
            status=200 if refusal is None else refusal.http_status,
            reload_s=RELOAD_S if pending else None,
        )


def _number(what: str, written: str, default: int) -> int:
    if not written:
        return default
    if not (written.isascii() and written.isdigit() and int(written[:12]) <= MAX_SEED):
        raise ConfigError(f"{what}={written[:40]!r} is not a number from 0 to {MAX_SEED}.")
    return int(written)
