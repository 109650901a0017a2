"""Puts the pages, their events and the sign-in into an application."""

from __future__ import annotations

from fastapi import FastAPI

from cache_service.api import session
from cache_service.api.page import routes
from cache_service.api.page.pages import Pages
from cache_service.api.page.service_ports import ServicePorts
from cache_service.api.service import Service


def add_pages(app: FastAPI, service: Service) -> Pages:
    """Include the routes. The caller closes what is returned when the application stops."""
    pages = Pages(ServicePorts(service), login=bool(service.config.tokens))
    app.state.pages = pages
    app.include_router(routes.router)
    app.include_router(session.router)
    return pages
