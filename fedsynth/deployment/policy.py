"""site.toml: a site's data, models and folders, and the policy of its operator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fedsynth.clients.approval import Approvals
from fedsynth.clients.audit_log import AuditLog
from fedsynth.data import rowstore
from fedsynth.data.sources import SiteData, laid_out
from fedsynth.deployment.invitation import check_name, host_and_port
from fedsynth.federation.messages import REQUESTS, Output
from fedsynth.identifiers import Kind
from fedsynth.limits import least
from fedsynth.privacy.cohort import SMALLEST
from fedsynth.privacy.plan import Budget
from fedsynth.scenario.earlier_keys import with_new_names
from fedsynth.system.folders import private_folder
from fedsynth.typed import BadValue, Count, Positive, build, in_range, toml_file

if TYPE_CHECKING:
    from fedsynth.data.partition import ClientData as Texts
    from fedsynth.privacy.ledger import Ledger

RENAMED: Mapping[Sequence[str], str] = {("policy", "orders"): "requests"}
SITE = "FEDSYNTH_SITE"  # environment variable: the path of site.toml
UNDER_GUARANTEE = tuple(o.task for o in REQUESTS if o.task not in ("train.self_train", "evaluate.evaluate"))


@dataclass(frozen=True)
class SuperLink:
    """The server's address and the site's key.

    Attributes:
        address: HOST:PORT of the SuperLink; always TLS.
        root_certificates: PEM file of the CA that the server's certificate is checked against.
        private_key: The site's key (EC, OpenSSH format); the server knows the site by it.
    """

    address: str
    root_certificates: str = "ca.crt"
    private_key: str = "keys/node"

    def __post_init__(self) -> None:
        host_and_port(self.address)


@dataclass(frozen=True)
class Models:
    """Models that the site uses instead of the scenario's: a folder, or a name as in a scenario.

    Attributes:
        generator: Causal or seq2seq model that learns the site's text. Sites that exchange adapters need the same one.
        task_model: The model of the site's classifier; sites may have different ones.
    """

    generator: str = ""
    task_model: str = ""


@dataclass(frozen=True)
class SumPolicy:
    """The terms on which the site takes part in secure sums (docs/secure-sum.md).

    Attributes:
        accept: The account is charged what a sum costs, which rests on the noise of the other sites. Else the site adds
            noise enough for its own messages, and is charged what those cost.
        clients: Least number of clients in an opened sum: a cohort's clients without its dropouts.
        colluders: Least number of other sites that a scenario must allow to be in league with the server.
        roster: Folder of the public keys of the sites that may take part, NAME.pub, this site's own among them.
    """

    accept: bool = False
    clients: Annotated[int, least(2)] = SMALLEST
    colluders: Annotated[int, least(0)] = 0
    roster: str = "roster"

    def __post_init__(self) -> None:
        in_range(self, "policy.secure_sum")


@dataclass(frozen=True)
class Policy:
    """The operator's policy. A scenario can only be stricter.

    Attributes:
        lifetime: Budget of all runs on this data set, forever. A request that would exceed it is refused unspent.
        per_run: Budget of all requests with one run's id; a scenario that asks for more gets this. The server chooses
            the id: this guards against its mistakes, `lifetime` against the server.
        strategies: Allowed strategies, as a scenario names them.
        requests: Allowed requests.
        outputs: Kinds of outputs that may leave: text, adapter, scores, votes, metrics. From an adapter anyone can
            sample text that nobody approved. Metrics are figures, on test rows, of models that learnt private text; no
            epsilon covers them.
        without_guarantee: Outputs may leave without a mechanism. The data's epsilon is infinite from then on.
        minimum_records: With fewer declared records the site takes part in nothing.
        models: Models of a scenario that may be loaded here.
        approve_text: Synthetic text waits for `fedsynth site approve`.
        identifiers: Kinds of identifiers and secrets (`fedsynth.identifiers`) with which no synthetic text leaves: a
            text that has one is left out, by its own form alone.
        bundles: SHA-256 of the server's allowed bundles; empty for any. Their code is never run in any case.
        secure_sum: The terms of secure sums; left out, the site takes part in none.
    """

    lifetime: Budget
    per_run: Budget | None = None
    strategies: tuple[str, ...] = ()
    requests: tuple[str, ...] = UNDER_GUARANTEE
    outputs: tuple[Output, ...] = ("text", "scores")
    without_guarantee: bool = False
    minimum_records: Count = 100
    models: tuple[str, ...] = ()
    approve_text: bool = True
    identifiers: tuple[Kind, ...] = ()
    bundles: tuple[str, ...] = ()
    secure_sum: SumPolicy | None = None

    def __post_init__(self) -> None:
        in_range(self, "policy")
        known = {request.task for request in REQUESTS}
        if strange := sorted(set(self.requests) - known):
            raise BadValue(f"policy.requests: no request {strange[0]!r}; there are {', '.join(sorted(known))}")
        for name, budget in (("lifetime", self.lifetime), ("per_run", self.per_run)):
            if budget is not None and budget.delta > Budget.delta:
                raise BadValue(f"policy.{name}: delta must be at most {Budget.delta:g}, got {budget.delta:g}")
        if self.per_run is not None and self.per_run.epsilon > self.lifetime.epsilon:
            raise BadValue(
                f"policy.per_run allows epsilon {self.per_run.epsilon:g}, more than policy.lifetime "
                f"({self.lifetime.epsilon:g})"
            )
        if self.outputs and not self.requests:
            raise BadValue("policy.requests is empty: such a site answers nothing; leave it out for the usual requests")
        for bundle in self.bundles:
            if not re.fullmatch(r"[0-9a-f]{64}", bundle):
                raise BadValue(f"policy.bundles: a SHA-256 has 64 hexadecimal digits, got {bundle!r}")


@dataclass(frozen=True)
class SiteConfig:
    """The content of site.toml.

    Attributes:
        name: Name under which the coordinator registered the site's key.
        data: The site's text.
        policy: The operator's policy.
        superlink: The server's address and the site's key.
        models: Models that the site uses instead of the scenario's.
        state: Folder of task models, logs and audit log; belongs to this site forever.
        accounts: Folder of the ledgers, one for each data set, forever; None for a folder in `state`. A hospital in
            two federations names the same folder in both, as one data set has one account.
        device: `auto` (a GPU if there is one), `cpu`, or the number of a GPU, as `cuda:1`.
        threads: Threads that one message may use on CPUs.
        start_seconds: Longest start of the site's programs. A dead program is noticed at once: this timeout is for a
            SuperNode that hangs before its first connection.
        contact: The person at the site who answers questions; in `fedsynth site check --statement` alone, sent nowhere.
    """

    name: str
    data: SiteData
    policy: Policy
    superlink: SuperLink
    models: Models = field(default_factory=Models)
    state: str = "state"
    accounts: str = ""
    device: str = "auto"
    threads: Count = 1
    start_seconds: Positive = 600.0
    contact: str = ""

    def __post_init__(self) -> None:
        in_range(self)
        check_name(self.name)
        if not re.fullmatch(r"auto|cpu|cuda:\d+", self.device):
            raise BadValue(f'device must be "auto", "cpu" or "cuda:NUMBER", got {self.device!r}')


@dataclass(frozen=True)
class Place:
    """A site's file and its folder, the base of all relative paths in the file."""

    site: SiteConfig
    folder: Path

    @property
    def cards(self) -> dict[str, str]:
        """Environment variables with which programs see the GPUs of `device` only."""
        if self.site.device == "auto":
            return {}
        return {"CUDA_VISIBLE_DEVICES": self.site.device.removeprefix("cpu").removeprefix("cuda:")}

    def path(self, name: str) -> Path:
        """The path of a file or folder that site.toml names."""
        return self.folder / name

    @property
    def state(self) -> Path:
        """The site's own folder."""
        return self.path(self.site.state)

    @property
    def accounts(self) -> Path:
        """The folder of accounts, one for each data set."""
        return self.path(self.site.accounts) if self.site.accounts else self.state / "accounts"

    @property
    def ledger(self) -> Path:
        """The account of the site's data set."""
        return self.accounts / self.site.data.id / "ledger.sqlite"

    @property
    def audit_log(self) -> Path:
        """The file of the audit log."""
        return self.state / "audit.jsonl"

    @property
    def approvals(self) -> Approvals:
        """The replies that wait for a person."""
        return Approvals(self.state / "approvals")

    def witness(self, who: Mapping[str, Any] | None = None) -> AuditLog:
        """The audit log, which takes entries about this data set.

        Args:
            who: Further facts of every entry, on the requester.
        """
        return AuditLog(self.audit_log, {**(who or {}), "dataset": self.site.data.id})

    def open_ledger(self, *, create: bool = False, behind: bool = False, **more: Any) -> Ledger:
        """The account, with the audit log as its witness unless another one is given.

        Raises:
            fedsynth.privacy.ledger_file.LedgerUnusable: If it cannot be used, lacks charges of the audit log, or does
                not exist and is not to be made.
        """
        from fedsynth.privacy.caps import Account
        from fedsynth.privacy.ledger import Ledger, Opening  # most commands need none

        if create:
            private_folder(self.ledger.parent)
        policy, told = self.site.policy, {"witness": self.witness(), **more}
        account = Account(self.site.data.id, policy.lifetime, policy.per_run)
        return Ledger(self.ledger, account, opening=Opening(create=create, behind=behind), **told)

    @property
    def rows(self) -> Path:
        """The site's imported rows; another site that reads other columns may share the account."""
        return self.state / "rows.jsonl"

    @property
    def imported(self) -> rowstore.Imported | None:
        """The facts of the rows imported under the present site.toml; None if there are none."""
        found = rowstore.about(self.rows)
        return found if found is not None and found.declared == self.site.data.digest else None

    def open_rows(self, ledger: Ledger, attributes: Sequence[str] = ()) -> Texts:
        """The site's text: the imported rows. Neither file nor database is opened.

        Args:
            ledger: The account, which has their key.
            attributes: The columns of `data.attributes` that a request works with.

        Raises:
            fedsynth.data.rowstore.RowsUnusable: If they differ from those written under the account's key.
        """
        return laid_out(rowstore.read(self.rows, ledger.mac_key), self.site.data, attributes)

    def model(self, name: str) -> str:
        """A model of site.toml in the form in which it is loaded."""
        return str(self.path(name)) if self.path(name).is_dir() else name


def load_site(path: Path) -> Place:
    """Reads site.toml, or that of a folder.

    Raises:
        BadValue: If it cannot be read, or a value does not fit; the message names file and key.
    """
    file = path / "site.toml" if path.is_dir() else path
    with toml_file(file, "make one with `fedsynth site init`") as table:
        return Place(build(SiteConfig, with_new_names(table, RENAMED)), file.absolute().parent)
