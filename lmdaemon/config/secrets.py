"""Reads the secrets that the configuration names, from files, systemd's credentials and the environment.

An error or warning about a secret names its key in the configuration, and never quotes what was read.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from lmdaemon import textfile, tls
from lmdaemon.config.findings import Findings
from lmdaemon.config.settings import ApiTable, ApiToken, OperatorTable
from lmdaemon.config.values import NAME, NAME_RULE, VARIABLE, whsec
from lmdaemon.model import id_problem

Secrets = Literal["required", "readable", "optional"]
TOKEN_ADVISED = 16  # characters; a shorter token is accepted with a warning


class SecretFiles:
    """Reads the files and variables that one configuration file names.

    `secrets` says how a missing one is treated: as an error ("required"); as an error unless the daemon may be able to
    read it where this process cannot ("readable"); or as a warning ("optional"). `digests` has a digest of each secret
    that was read, by key path; `handed_over` has the keys whose files are in $CREDENTIALS_DIRECTORY.
    """

    def __init__(self, file: Path, secrets: Secrets, findings: Findings) -> None:
        self._directory = file.parent
        self._secrets = secrets
        self._findings = findings
        self.digests: dict[str, str] = {}
        self.handed_over: list[str] = []

    # -- files

    def beside(self, name: str) -> Path:
        """The path of a file that the configuration names. A relative name is looked up in $CREDENTIALS_DIRECTORY, then
        beside the configuration file.
        """
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if credentials and not Path(name).is_absolute():
            handed_over = Path(credentials) / name
            if exists(handed_over):
                return handed_over
        return self._directory / name

    def _places(self, name: str) -> str:
        """Where `beside` looked for a file that is in none of these places, in words."""
        credentials, path = os.environ.get("CREDENTIALS_DIRECTORY"), (self._directory / name).absolute()
        if not credentials or Path(name).is_absolute():
            return str(path)
        return f"looked for {Path(credentials) / name}, then for {path}"

    def read(self, name: str, at: str, *, secret: bool = False) -> bytes | None:
        """The content of a file that the configuration names. If it cannot be read, records that and returns None."""
        path = self.beside(name)
        try:
            content = path.read_bytes()
            mode = stat.S_IMODE(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            unseen = self._secrets == "readable" and (isinstance(error, PermissionError) or _may_be_handed_over(name))
            where = self._places(name) if isinstance(error, FileNotFoundError) else str(path)
            self._report(unseen)(at, f"cannot be read: {getattr(error, 'strerror', error)} ({where})")
            return None
        if path != self._directory / name:
            self.handed_over.append(at)
        if secret and mode & 0o004:
            self._findings.warn(at, f"others can read this secret (mode {mode:o}): {path}")
        return content

    def _report(self, unseen: bool = False) -> Callable[[str, str], None]:
        return self._findings.unchecked if unseen or self._secrets == "optional" else self._findings.error

    # -- one secret

    def secret(self, table: msgspec.Struct, key: str, at: str) -> str | None:
        """The secret in the file of `KEY_file` or the variable of `KEY_env`, without the line break at its end; None
        when neither is set.
        """
        file_name, variable = getattr(table, f"{key}_file"), getattr(table, f"{key}_env")
        if file_name and variable:
            self._findings.error(f"{at}.{key}_file", f"and {key}_env must not both be given")
            return None
        if variable:
            return self._variable(variable, f"{at}.{key}_env")
        return self._file(file_name, f"{at}.{key}_file") if file_name else None

    def _variable(self, variable: str, at: str) -> str | None:
        content = os.environb.get(os.fsencode(variable), b"") if id_problem(variable) is None else b""
        if not content.strip():
            got = f"got {variable!r}" if VARIABLE.fullmatch(variable) else "what it has is not shown: is it the secret?"
            self._report()(at, f"must name an environment variable that is set ({got})")
            return None
        return self._text(content, at, f"${variable}")

    def _file(self, name: str, at: str) -> str | None:
        content = self.read(name, at, secret=True)
        return None if content is None else self._text(content, at, str(self.beside(name)))

    def _text(self, content: bytes, at: str, source: str) -> str | None:
        try:
            self.digests[at] = tls.digest(content)
            value = textfile.decode(content).rstrip("\r\n")
        except ValueError as error:
            self._findings.error(at, f"{error} ({source})")
            return None
        if not value.strip():
            self._findings.error(at, f"must not be empty ({source})")
            return None
        return value

    # -- several secrets, one a line

    def _lines(self, table: msgspec.Struct, key: str, at: str) -> list[tuple[int, str]]:
        """The secrets of a file with one secret a line, with their line numbers. During a rotation, a file has several.
        Blank lines and comments (#) are skipped.
        """
        value = self.secret(table, key, at)
        lines = textfile.entries(value) if value else []
        if value and not lines:
            self._findings.error(_place_of(table, key, at), "must not have comments alone")
        return lines

    def partner_tokens(self, table: OperatorTable, at: str) -> tuple[str, ...]:
        """The tokens of `partner_token_file`, or of its variable."""
        place = _place_of(table, "partner_token", at)
        lines = self._lines(table, "partner_token", at)
        for number, token in lines:
            self._check_length(token, f"{place}: line {number}")
        return tuple(token for _, token in lines)

    def signing_keys(self, table: OperatorTable, at: str) -> tuple[bytes, ...]:
        """The keys of `signing_secret_file`, or of its variable."""
        place = _place_of(table, "signing_secret", at)
        found: list[bytes] = []
        for number, line in self._lines(table, "signing_secret", at):
            try:
                found.append(whsec(line))
            except ValueError as error:
                self._findings.error(place, f"line {number}: {error}")
        return tuple(found)

    def api_tokens(self, table: ApiTable) -> tuple[ApiToken, ...]:
        """The API tokens. Each line of the files is `token` or `name:token`; the name is for the log. The tokens of
        `token_file`, which may change something, come first.
        """
        found: dict[bytes, ApiToken] = {}
        for key, may_change in (("token", True), ("read_token", False)):
            place = _place_of(table, key, "api")
            for number, line in self._lines(table, key, "api"):
                at = f"{place}: line {number}"
                name, _, secret = line.partition(":") if ":" in line else ("", "", line)
                token = ApiToken(secret.strip().encode(), name, may_change)
                if ":" in line and not NAME.fullmatch(name):
                    self._findings.error(at, f"what stands before a colon is the token's name, and {NAME_RULE}")
                elif not token.secret:
                    self._findings.error(at, "has a name without a token")
                elif found.setdefault(token.secret, token).may_change != may_change:
                    self._findings.error(at, "is a token of token_file too, which may change things")
                self._check_length(secret.strip(), at)
        if (table.read_token_file or table.read_token_env) and not (table.token_file or table.token_env):
            self._findings.error("api.read_token_file", "needs token_file beside it: else nobody may change anything")
        return tuple(found.values())

    def _check_length(self, token: str, at: str) -> None:
        if 0 < len(token) < TOKEN_ADVISED:
            self._findings.warn(at, f"a token of fewer than {TOKEN_ADVISED} characters may be guessed")


def exists(path: Path) -> bool:
    """Whether the file exists. If this user may not search the directory, the file counts as existing; reading it then
    reports the error.
    """
    try:
        return path.exists()
    except OSError:
        return True


def _may_be_handed_over(name: str) -> bool:
    """Whether this process is an ExecReload= command of the service, which may not see credentials that the daemon has.

    To such a command systemd 257 shows no credentials directory, and 252 one that cannot be entered
    (systemd/systemd#35227). It can be recognised by $MAINPID (systemd.exec(5)).
    """
    return not Path(name).is_absolute() and "MAINPID" in os.environ and "CREDENTIALS_DIRECTORY" not in os.environ


def _place_of(table: msgspec.Struct, key: str, at: str) -> str:
    return f"{at}.{key}_{'env' if getattr(table, f'{key}_env') else 'file'}"
