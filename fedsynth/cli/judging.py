"""The command `fedsynth judge`: the arms of a simulation compared response by response by a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedsynth.system.terminal import console_of
from fedsynth.typed import BadValue


def judge_command(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a simulation with instructions.")],
    judge: Annotated[str, typer.Option(help="A model that converses, named as in a scenario; or http(s)://HOST/v1.")],
    arms: Annotated[str, typer.Option(help="Two arms or more, separated by commas; all that ran by default.")] = "",
    model: Annotated[str, typer.Option(help="Endpoint: the model's name at the server.")] = "",
    key_env: Annotated[str, typer.Option(help="Endpoint: the environment variable that holds the key.")] = "",
    most: Annotated[int, typer.Option(help="Most test instructions of a pair of arms.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(help="Longest verdict, in tokens.")] = 256,
    public_data: Annotated[
        bool, typer.Option("--public-data", help="The clients' text is public: responses may go to another machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the judgements as JSON, last.")] = False,
) -> None:
    """Compare the responses of a run's arms to their test instructions, in both orders: docs/report.md."""
    if most < 1:
        raise BadValue(f"--most must be at least 1, got {most}")
    if max_new_tokens < 1:
        raise BadValue(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    from fedsynth.reporting.judging import figure, judge_run, judgements, open_judge, responses
    from fedsynth.reporting.run_report import read_scenario
    from fedsynth.scenario.server import Endpoint

    scenario = read_scenario(place)
    named = [arm.strip() for arm in (arms or ",".join(scenario.run)).split(",") if arm.strip()]
    for arm in named:  # before the judge is loaded
        responses(place, scenario, arm)
    asked: str | Endpoint = judge
    if judge.startswith(("http://", "https://")):
        if not model:
            raise BadValue("--model must name the endpoint's model")
        asked = Endpoint(judge, model, key_env=key_env or None, api="chat")
    opened = open_judge(scenario, asked, public_data=public_data, max_new_tokens=max_new_tokens)
    done = judge_run(place, scenario, opened, model or judge, named, most=most)
    console = console_of(error=as_json)
    for each in done:
        told = f"{each.first} against {each.second}: {each.win} won, {each.tie} tied, {each.lose} lost"
        unread = f", {each.unreadable} without a verdict" if each.unreadable else ""
        spread = f"; net {figure(each.net)} ({figure(each.low)} to {figure(each.high)})"
        console.print(f"{told}{unread}{spread}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(judgements(place)))
