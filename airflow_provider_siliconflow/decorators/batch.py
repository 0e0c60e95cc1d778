"""``@task.siliconflow_batch``: a function that returns rows, and the job that runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.providers.common.compat.sdk import (
    SET_DURING_EXECUTION,
    DecoratedOperator,
    context_merge,
    determine_kwargs,
    task_decorator_factory,
)

from airflow_provider_siliconflow.operators.run import RunBatchOperator

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context, TaskDecorator


class SiliconFlowBatchDecoratedOperator(DecoratedOperator, RunBatchOperator):
    """
    Run the rows that a function returns or yields; see :class:`~..operators.batch.RunBatchOperator`.

    The function is called once: a retry continues with the rows that the first try planned. Its rows are not
    rendered as templates.

    :param python_callable: returns or yields rows, or returns the path of a JSONL file.
    :param op_args: positional arguments of the function.
    :param op_kwargs: keyword arguments of the function.
    """

    template_fields: Sequence[str] = tuple(
        field
        for field in (*DecoratedOperator.template_fields, *RunBatchOperator.template_fields)
        if field != "requests"
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **DecoratedOperator.template_fields_renderers,
        **RunBatchOperator.template_fields_renderers,
    }
    custom_operator_name: str = "@task.siliconflow_batch"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("multiple_outputs", None):
            raise ValueError(
                "@task.siliconflow_batch does not take multiple_outputs: its manifest is one value"
            )
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            requests=SET_DURING_EXECUTION,
            # The manifest is one value: its keys are not separate XComs.
            multiple_outputs=False,
            **kwargs,
        )
        self._context: Context | None = None

    def execute(self, context: Context) -> Any:
        """Run the job; the function is called when its rows are needed."""
        self._context = context
        return RunBatchOperator.execute(self, context)

    def _rows(self) -> Any:
        from airflow_provider_siliconflow.paths import open_source

        assert self._context is not None
        context_merge(self._context, self.op_kwargs)
        kwargs = determine_kwargs(self.python_callable, self.op_args, self._context)
        rows = self.python_callable(*self.op_args, **kwargs)
        return open_source(rows, self._requests_name()) if isinstance(rows, str) else rows

    def lineage_input(self) -> Any:
        """Return ``None``: the rows come from a function."""
        return None

    def _requests_name(self) -> str:
        return f"what {self.python_callable.__name__}() returned"


def siliconflow_batch_task(python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> TaskDecorator:
    """
    Turn a function that returns or yields rows into a task that runs them.

    .. code-block:: python

        @task.siliconflow_batch(output_dir="s3://bucket/{{ run_id }}", model="deepseek-ai/DeepSeek-V3")
        def summaries(articles: list[str]):
            for article in articles:
                yield f"Summarise in one sentence: {article}"

    :param python_callable: the function.
    :param kwargs: arguments of :class:`~airflow_provider_siliconflow.operators.batch.RunBatchOperator`.
    """
    return task_decorator_factory(
        python_callable=python_callable,
        decorated_operator_class=SiliconFlowBatchDecoratedOperator,
        **kwargs,
    )
