"""Links from a task to the vendor's console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator

#: The console's list of batches; no link to a single batch is known.
CONSOLE_URL = "https://cloud.siliconflow.cn/me/batches"


class BatchConsoleLink(BaseOperatorLink):
    """The account's batches on the vendor's console."""

    name = "SiliconFlow batches"

    def get_link(self, operator: BaseOperator, *, ti_key: Any, **_: Any) -> str:
        """Return the address, which is the same for every task."""
        return CONSOLE_URL
