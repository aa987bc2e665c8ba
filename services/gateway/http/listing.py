"""`/v1/models`: the base model and every adapter by its name."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from services.gateway.generations import no_deadline
from services.gateway.models import ListedModel, ListPosition, Models, ResolvedModel

_PAGE_SIZE = 1000


class ModelListing:
    """Lists models, and looks one up."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._started_at = int(time.time())

    async def list(self, request: Request) -> JSONResponse:
        """All models that the caller may use; OpenAI's API has no pages here."""
        listed: list[ListedModel] = []
        position: ListPosition | None = None
        while True:
            page, position = self._models.page(position, _PAGE_SIZE, request.state.tenant)
            listed += page
            if position is None:
                return JSONResponse({"object": "list", "data": [self._entry(m.model.name, m.model) for m in listed]})

    async def get(self, request: Request) -> JSONResponse:
        """One model: the base model, `name` or `name@version`, under the name that was asked for."""
        name: str = request.path_params["model"]
        return JSONResponse(self._entry(name, await self._models.resolve(name, no_deadline, request.state.tenant)))

    def _entry(self, name: str, model: ResolvedModel) -> dict[str, Any]:
        """`root` and `parent` are vLLM's: what answers, and the base model of an adapter."""
        adapter = model.adapter
        return {
            "id": name,
            "object": "model",
            "created": self._started_at if adapter is None else adapter.created_at[0],
            "owned_by": "slora",
            "root": model.public_id,
            "parent": None if adapter is None else model.base_model,
        }
