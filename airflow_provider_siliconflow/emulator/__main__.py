"""``siliconflow-emulator``: a local SiliconFlow, to try DAGs without a key or any spending."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from textwrap import fill, indent
from typing import TYPE_CHECKING, Any

from airflow_provider_siliconflow.emulator.config import CHOICES, DEFAULT_MODELS, EmulatorConfig
from airflow_provider_siliconflow.emulator.faults import KINDS, Fault, Faults
from airflow_provider_siliconflow.emulator.server import EmulatorServer, connection_json
from airflow_provider_siliconflow.emulator.service import EmulatedService

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("siliconflow-emulator")

_PRICED = "deepseek-ai/DeepSeek-V3=1/4/0.5"

_EPILOG = f"""\
faults (--fault, repeatable): MATCH:KIND[=VALUE][,NAME=VALUE...] or a JSON object
  'POST /batches:status-after=502'                  the batch is created, the answer is a 502
  'POST /chat/completions:status=503,times=50'      fifty live requests are refused
  'GET /batches/*:status=429,times=3,retry-after=2' three polls are refused
  'GET storage:cut=1000,skip=1'                     the second download ends after 1,000 bytes
  'GET /batches/*:gzip-bomb=500000000'              a poll is answered with 500 MB, compressed to 0.5 MB
  '{{"match": "POST /batches", "kind": "rewrite", "rename": {{"id": "batch_id"}}, "remove": ["status"]}}'
{indent(fill("kinds: " + ", ".join(KINDS), 90), "  ")}
  An answer is rewritten with rename, merge, remove, envelope=true, status=CODE, body or raw (text).
  Paths have dots, * is every item: {{"merge": {{"data.*.metadata": null}}}}. Also {{"$text": 1000000}},
  {{"$digits": 400}}, {{"$nested": 500}} as values. Seconds are real seconds, whatever the speed.

markers in the user messages of a row:
  [[emulator:error=400]]   the row fails            [[emulator:once=429]]  ... only the first time it is run
  [[emulator:missing]]     it is in neither file    [[emulator:missing-once]]
  [[emulator:expire]]      it is not run in time    [[emulator:length]]    the answer is cut short
  [[emulator:empty]]       the answer is empty      [[emulator:duplicate]] its line comes twice
  [[emulator:wrong-model]] another model answers        [[emulator:invalid]]   one of the next three, by row
  [[emulator:not-json]]    the answer is a refusal      [[emulator:wrong-type]]    a field has another type
  [[emulator:missing-field]] a required field is absent [[emulator:fenced]]    the answer is in a code fence
  [[emulator:thinking]]    <think>...</think> before it
  Those for a wrong answer, length and empty also end in -once: only the first time the row is run.
  A row that is asked live is not missing, not late and not duplicated; all else applies.

The emulator's own API is below /_emulator/ on the same port. It needs a loopback Host, and a
Content-Type of application/json for all but GET:
  GET state, bill, live, requests, faults, config    POST faults, config, release, clock, seed    DELETE faults
  POST batches/ID/status, batches/ID/cancel (as on the console), files/ID/forget
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(
        prog="siliconflow-emulator",
        description="Run a local SiliconFlow batch API: no key, no network, no cost. "
        "The answers are made up; the same rows always get the same answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    net = command.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    net.add_argument(
        "--port", type=int, default=8787, help="port of the API, 0 for a free one (default: %(default)s)"
    )
    net.add_argument(
        "--storage-port", type=int, default=0, help="port of the result storage (default: a free one)"
    )
    net.add_argument(
        "--storage-host", default="localhost", help="host name in result URLs (default: %(default)s)"
    )
    net.add_argument("--port-file", type=Path, metavar="PATH", help="write the base URL here once it listens")

    batches = command.add_argument_group("batches")
    _number(batches, "--speed", "run everything this many times faster than the real service")
    _number(batches, "--queue-seconds", "time in_queue")
    _number(batches, "--rows-per-second", "rows one batch finishes per second")
    _number(batches, "--finalizing-seconds", "time from the last row to completed")
    _number(batches, "--cancelling-seconds", "time from cancelling to cancelled")
    _number(batches, "--row-error-rate", "share of rows that fail the first time they are run")

    live = command.add_argument_group("live requests, on /chat/completions (seconds are real ones)")
    _number(live, "--live-latency", "seconds an answer takes")
    _number(live, "--live-jitter", "share by which that varies from body to body")
    _number(
        live, "--live-rpm", "refuse with 429 beyond this many requests per minute and model; 0 is no limit"
    )
    _number(live, "--live-tpm", "the same for tokens, of prompt and answer; 0 is no limit")
    _number(live, "--live-burst", "seconds of these limits that can be used at once, but always one request")
    _number(live, "--live-retry-after", "seconds that a 429 states in Retry-After; 0 leaves the header out")
    _number(
        live, "--live-error-rate", "share of rows that fail with 429 or 503 the first time they are asked"
    )

    account = command.add_argument_group("account and answers")
    account.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="keep files and batches here across restarts"
    )
    account.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help='JSONL of {"question": ..., "answer": ...}: what the models know; with "prompt" or "custom_id" in '
        "place of question, the whole answer to a prompt or a row",
    )
    _repeatable(
        account,
        "--model",
        "NAME=SKILL",
        "add or change a model; skill (0 to 1) is the share of known questions it answers correctly",
    )
    _repeatable(
        account, "--key", "KEY", "accept only this API key (default: any that does not begin with sk-invalid)"
    )
    _repeatable(account, "--batch-model", "NAME", "refuse batches of other models than this with 20012")
    _repeatable(account, "--no-json-model", "NAME", "this model refuses JSON mode with 20024")
    _repeatable(account, "--no-thinking-model", "NAME", "this model refuses enable_thinking with 20015")
    _number(account, "--thinking-tokens", "tokens of thinking, at most thinking_budget; 0 is a sentence")
    _number(account, "--cached-share", "share of the tokens of a prompt that come from the service's cache")
    _repeatable(
        account,
        "--price",
        "NAME=PROMPT/COMPLETION[/CACHED]",
        "what a model costs in batches, in CNY per million tokens, for the bill (/_emulator/bill)",
    )
    _repeatable(
        account,
        "--live-price",
        "NAME=PROMPT/COMPLETION[/CACHED]",
        "what a model with a --price costs live",
    )
    _number(account, "--balance", "charge balance in CNY; 0 refuses new batches and live requests")
    _number(account, "--max-open-batches", "refuse a batch with 429 while this many are open; 0 is no limit")
    _choice(account, "--missing-file-status", "status that refuses a batch over an unknown file")

    wrong = command.add_argument_group("wrong answers (shares of the rows, the first time they are run)")
    _number(wrong, "--invalid-rate", "not JSON, a field of the wrong type or a field missing")
    _number(wrong, "--truncated-rate", "cut short, with the finish reason length")
    _number(wrong, "--empty-rate", "empty")
    _number(wrong, "--fenced-rate", "in a code fence")
    _number(wrong, "--thinking-rate", "after thinking in <think>")
    _number(wrong, "--wrong-attempts", "how often these can befall one row; each time is drawn anew")

    odd = command.add_argument_group("odd behaviour (seconds here are never divided by the speed)")
    _repeatable(odd, "--fault", "SPEC", "see below")
    _number(odd, "--late-output-seconds", "finished batches show their result URLs this many seconds later")
    _number(odd, "--late-error-seconds", "the same for the error file alone", "as --late-output-seconds")
    _number(
        odd,
        "--partial-output-seconds",
        "the output file contains only half of its lines until this many seconds after the end",
    )
    _number(odd, "--settle-seconds", "request counts are right only this many seconds after the end")
    _choice(odd, "--settle-as", "what is shown for the counts until then")
    _number(odd, "--list-lag-seconds", "new batches show up in the list this many seconds later")
    _switch(odd, "--list-oldest-first", "the batch list begins with the oldest")
    _number(odd, "--list-limit", "the batch list holds only this many and has no pages; 0 is no limit")
    _switch(odd, "--list-endless", "the batch list never ends: every page is full of new batches")
    _choice(odd, "--list-metadata", "how the batch list shows metadata")
    _choice(odd, "--batch-metadata", "how an answer about one batch shows metadata")
    _number(odd, "--clock-offset-seconds", "added to every time the service states; may be negative")
    _number(odd, "--url-ttl-seconds", "time for which a result URL is valid")
    _switch(odd, "--ignore-cursor", "the batch list repeats its first page forever")
    _switch(odd, "--flat-files", "file answers are flat, OpenAI-style objects")
    _switch(odd, "--results-as-file-ids", "output_file_id is a file id instead of a URL")

    command.add_argument("-v", "--verbose", action="store_true", help="log every request, polls too")
    command.add_argument("-q", "--quiet", action="store_true", help="log warnings only")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the emulator until SIGINT or SIGTERM, and return the exit status."""
    command = parser()
    options = command.parse_args(arguments)
    level = logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    _allow_many_connections()
    faults = Faults()
    try:
        config = _config(options)
        for spec in options.fault:
            faults.add(Fault.parse(spec))
    except (ValueError, OSError) as error:
        command.error(str(error))
    with contextlib.ExitStack() as stack:
        folder = options.data_dir or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="siliconflow-", ignore_cleanup_errors=True)
        )
        try:
            service = EmulatedService(config, folder, persistent=options.data_dir is not None)
        except (ValueError, OSError) as error:
            command.error(str(error))
        try:
            asyncio.run(_serve(EmulatorServer(service, faults), options))
        except (OSError, OverflowError) as error:
            print(f"{command.prog}: cannot listen: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            pass
    return 0


def _allow_many_connections() -> None:
    """Raise the limit of open files as far as allowed: the usual 1,024 is too low for a load test."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(server: EmulatorServer, options: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        await server.start(options.host, options.port, options.storage_port, options.storage_host)
        connection = connection_json(server.base_url, server.service.config)
        print(f"SiliconFlow emulator listens on {server.base_url} (results on {server.storage_url})")
        print("Connect Airflow to it with:\n")
        print(f"  export AIRFLOW_CONN_SILICONFLOW_DEFAULT='{connection}'\n", flush=True)
        if options.port_file is not None:
            _write_at_once(options.port_file, server.base_url)
        await stopped.wait()
    finally:
        await server.stop()


def _config(options: argparse.Namespace) -> EmulatorConfig:
    values: dict[str, Any] = {
        one.name: getattr(options, one.name)
        for one in fields(EmulatorConfig)
        if getattr(options, one.name, None) is not None
    }
    values["keys"] = tuple(options.key)
    values["models"] = {**DEFAULT_MODELS, **dict(map(_model, options.model))}
    values["prices"] = _prices(options.price, options.live_price)
    for name in ("batch_model", "no_json_model", "no_thinking_model"):
        values[f"{name}s"] = tuple(getattr(options, name))
    return EmulatorConfig(**values)


def _model(text: str) -> tuple[str, float]:
    name, equals, skill = text.rpartition("=")
    try:
        return name if equals and name else _fail(text), float(skill)
    except ValueError:
        return _fail(text), 0.0


def _prices(batch: Sequence[str], live: Sequence[str]) -> dict[str, dict[str, Any]]:
    prices: dict[str, dict[str, Any]] = dict(_price("--price", text) for text in batch)
    for name, rates in (_price("--live-price", text) for text in live):
        if name not in prices:
            raise ValueError(f"--live-price: {name} needs a --price, too, which is that of batches")
        prices[name]["live"] = rates
    return prices


def _price(option: str, text: str) -> tuple[str, dict[str, str]]:
    name, _, price = text.rpartition("=")
    amounts = price.split("/")
    if not name or len(amounts) not in (2, 3):
        raise ValueError(
            f"{option} is written NAME=PROMPT/COMPLETION[/CACHED], for example {_PRICED}, not {text!r}"
        )
    return name, dict(zip(("prompt", "completion", "cached_prompt"), amounts, strict=False))


def _fail(text: str) -> str:
    raise ValueError(f"--model must be NAME=SKILL, for example deepseek-ai/DeepSeek-V3=0.8, not {text!r}")


def _default(name: str) -> Any:
    return getattr(EmulatorConfig, name[2:].replace("-", "_"))


def _number(group: argparse._ArgumentGroup, name: str, text: str, default: str | None = None) -> None:
    kind = int if isinstance(_default(name), int) else float
    shown = default or f"{_default(name):.10g}"
    group.add_argument(name, type=kind, metavar="N", help=f"{text} (default: {shown})")


def _choice(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    default = _default(name)
    choices = CHOICES[name[2:].replace("-", "_")]
    group.add_argument(name, type=type(default), choices=choices, help=f"{text} (default: {default})")


def _repeatable(group: argparse._ArgumentGroup, name: str, metavar: str, text: str) -> None:
    group.add_argument(name, action="append", default=[], metavar=metavar, help=f"{text}; repeatable")


def _switch(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    group.add_argument(name, action="store_true", default=None, help=text)


def _write_at_once(path: Path, text: str) -> None:
    """Write a file so that a watcher never sees a partial one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
