#!/bin/sh
# install.sh install | uninstall: what `make install` and `make uninstall` do. `make deb` makes its package from the
# tree that this script installs, so that the layout is described only here.
#
# From the environment: PREFIX, a directory for the virtual environment alone; DESTDIR, a directory that is used instead
# of / (then nothing outside it is changed, and no user is made); BINDIR, the directory for a link to the command;
# PYTHON; EXTRAS, such as "fast"; SOURCE_DATE_EPOCH, the time that every file gets.
#
# Every installed file is listed in PREFIX/installed-files. An upgrade removes files that are only in the old list, and
# `uninstall` removes the files in the list. Files that an administrator added stay.
set -eu
cd "$(dirname "$0")/.."
umask 022

PREFIX=${PREFIX:-/opt/lmdaemon}
DESTDIR=${DESTDIR:-}
BINDIR=${BINDIR:-/usr/local/bin}
PYTHON=${PYTHON:-/usr/bin/python3}
EXTRAS=${EXTRAS:-}
# The program finds these two by their names, so they cannot be chosen.
CONFIG=/etc/lmdaemon
STATE=/var/lib/lmdaemon
# The directory for plug-ins. The service runs in Python's isolated mode, which ignores PYTHONPATH.
PLUGINS=/usr/local/lib/lmdaemon
UNITS=/usr/lib/systemd/system
SYSUSERS=/usr/lib/sysusers.d

DOC=$PREFIX/share/doc/lmdaemon
# Where man and shells look for page and completions of a command in BINDIR. zsh has another directory for packages.
case $BINDIR in
    */bin) SHARE=${BINDIR%/bin}/share ;;
    *) SHARE=$PREFIX/share ;;
esac
[ "$SHARE" = /usr/share ] && ZSH=$SHARE/zsh/vendor-completions || ZSH=$SHARE/zsh/site-functions
LIST=$PREFIX/installed-files
HERE=$DESTDIR$PREFIX

say() { printf '%s\n' "$*"; }
die() { printf 'make %s: %s\n' "$ACTION" "$*" >&2; exit 1; }
is_real() { [ -z "$DESTDIR" ]; }
has_systemd() { is_real && [ -d /run/systemd/system ]; }

# -- checks, before anything is changed

check_target() {
    case $PREFIX$BINDIR$DESTDIR in *[!A-Za-z0-9/._+~-]*) die "PREFIX, BINDIR, DESTDIR: letters, digits and /._+~- only" ;; esac
    case $PREFIX in /*[!/]*) ;; *) die "PREFIX: must be an absolute directory (got '$PREFIX')" ;; esac
    if is_real; then
        [ "$(id -u)" = 0 ] || die "needs root, or a DESTDIR to put the tree into"
        ! dpkg-query -W -f '${db:Status-Abbrev}' lmdaemon 2>/dev/null | grep -q '^.i' ||
            die "lmdaemon is installed as a Debian package: upgrade with dpkg or apt, or remove it first"
        # Another owner of one of these could replace a file by a link, and root would write to the file it leads to.
        for place in "$PREFIX" "$CONFIG"; do
            [ ! -e "$place" ] || [ "$(stat -Lc %u "$place")" = 0 ] || die "$place: must be root's own directory"
        done
    fi
}

check_room() {
    [ -e "$HERE/installed-files" ] || [ -z "$(ls -A "$HERE" 2>/dev/null)" ] ||
        die "PREFIX: must be a directory of lmdaemon's own; $HERE holds other things"
    link=$DESTDIR$BINDIR/lmdaemon
    { [ ! -e "$link" ] && [ ! -L "$link" ]; } || [ "$(readlink "$link")" = "$PREFIX/bin/lmdaemon" ] ||
        die "$link: is there and not of this installation; move it away, or name another BINDIR"
}

check_python() {
    command -v "$PYTHON" >/dev/null || die "needs Python: apt install python3 python3-venv ($PYTHON not found)"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "needs Python 3.11 or newer ($PYTHON is older)"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || die "needs Python's venv: apt install python3-venv"
    case $("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.executable))') in
        /root/* | /home/* | /tmp/*) die "PYTHON: $PYTHON lies where the sandboxed service cannot see it; use the system's" ;;
    esac
}

# -- the virtual environment, made in $work/venv as if it were at PREFIX

build_venv() {
    venv=$work/venv
    # The tools run only once, so they are not compiled; the environment is compiled below. (To pip, the value "no" of
    # this variable means: do not compile.)
    export PIP_NO_COMPILE=no
    "$PYTHON" -m venv "$work/pip"
    pip="$work/pip/bin/python -m pip --disable-pip-version-check -qq"
    # Built from a copy: a build in the source tree would leave files of root's there, and would use leftovers of an
    # older build.
    mkdir "$work/source"
    cp -R pyproject.toml README.md lmdaemon "$work/source"
    $pip wheel --no-deps --wheel-dir "$work/own" "$work/source"
    "$PYTHON" -m venv --without-pip "$venv"
    $pip --python "$venv/bin/python" install --no-compile --only-binary :all: --constraint constraints.txt \
        "$(echo "$work"/own/*.whl)${EXTRAS:+[$EXTRAS]}"
    find "$venv/bin" -mindepth 1 ! -name 'python*' ! -name lmdaemon -delete
    rm -rf "$venv/include" "$venv/lib64"
    # Remove what depends on the place of the build: the path of the wheel, and checksums of the scripts that pip wrote.
    rm "$venv"/lib/python3*/site-packages/lmdaemon-*.dist-info/direct_url.json
    sed -i '\|^\.\./\.\./\.\./bin/|d; \|/direct_url.json,|d' "$venv"/lib/python3*/site-packages/*.dist-info/RECORD
    # In isolated mode, as the service is: both import the same modules, whatever root's current directory is.
    sed -i "1s|.*|#!$PREFIX/bin/python -I|" "$venv/bin/lmdaemon"
    sed -i "s|$venv|$PREFIX|" "$venv/pyvenv.cfg"
    site=$(echo "$venv"/lib/python3*/site-packages)
    echo "$PLUGINS" >"$site/lmdaemon-plugins.pth"
    find "$venv" -type d -name __pycache__ -prune -exec rm -rf {} +
    chmod -R u=rwX,go=rX "$venv"
    [ -z "${SOURCE_DATE_EPOCH:-}" ] || find "$venv" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
    "$venv/bin/python" -I -m compileall -q --invalidation-mode timestamp -s "$venv" -p "$PREFIX" "$venv/lib"
}

# The manual page and the completions are all made from the parser of the command line.
build_manual() {
    mkdir "$work/manual"
    $pip install --target "$work/tools" --constraint constraints.txt argparse-manpage shtab
    # The tools are in another directory, so that the environment is not changed
    run() { PYTHONPATH=$work/tools PYTHONDONTWRITEBYTECODE=1 "$work/venv/bin/python" "$@"; }
    run -c 'from argparse_manpage.cli import main; main()' --module lmdaemon.commands.completion --function whole --prog lmdaemon \
        --project-name lmdaemon --manual-title lmdaemon --format single-commands-section \
        --description "sessions, their expiry, and its delivery (SessionExpired)" --output "$work/manual/lmdaemon.1"
    gzip -9n "$work/manual/lmdaemon.1"
    for shell in bash zsh fish; do
        run -m lmdaemon completion "$shell" >"$work/manual/$shell"
    done
}

# -- installing files

list() { printf '%s\n' "$1" >>"$work/list"; }

# put MODE FILE TARGET: installs a file by a rename, because a running daemon may have the old file open.
put() {
    mkdir -p "$DESTDIR$(dirname "$3")"
    install -m "$1" "$2" "$DESTDIR$3.new"
    [ -z "${SOURCE_DATE_EPOCH:-}" ] || touch --date "@$SOURCE_DATE_EPOCH" "$DESTDIR$3.new"
    mv -f "$DESTDIR$3.new" "$DESTDIR$3"
}
put_listed() { put "$@" && list "$3"; }

install_venv() {
    mkdir -p "$HERE"
    cp -a --remove-destination "$work/venv/." "$HERE/"
    chmod 755 "$HERE"
    (cd "$work/venv" && find . ! -type d | sed "s|^\.|$PREFIX|") >>"$work/list"
}

# Drop-ins are optional, so they are put beside the documents.
install_units() {
    for unit in systemd/*.service systemd/*.socket systemd/*.conf; do
        case $unit in
            *.sysusers.conf | *\**) continue ;;
            *.conf) target=$DOC ;;
            *) target=$UNITS ;;
        esac
        sed -e "s|/opt/lmdaemon|$PREFIX|g" -e "s|/usr/share/doc/lmdaemon|$DOC|g" "$unit" >"$work/unit"
        put_listed 644 "$work/unit" "$target/${unit##*/}"
    done
    put_listed 644 systemd/lmdaemon.sysusers.conf "$SYSUSERS/lmdaemon.conf"
}

install_docs() {
    find README.md CHANGELOG.md docs -type f -name '*.*' ! -name '*.pyc' ! -path 'docs/site/*' >"$work/docs"
    while read -r file; do put_listed 644 "$file" "$DOC/$file"; done <"$work/docs"
}

install_manual() {
    put_listed 644 "$work/manual/lmdaemon.1.gz" "$SHARE/man/man1/lmdaemon.1.gz"
    put_listed 644 "$work/manual/bash" "$SHARE/bash-completion/completions/lmdaemon"
    put_listed 644 "$work/manual/zsh" "$ZSH/_lmdaemon"
    put_listed 644 "$work/manual/fish" "$SHARE/fish/vendor_completions.d/lmdaemon.fish"
}

install_command() {
    mkdir -p "$DESTDIR$BINDIR"
    ln -sfn "$PREFIX/bin/lmdaemon" "$DESTDIR$BINDIR/lmdaemon"
    list "$BINDIR/lmdaemon"
}

# The service's config.toml has the database's absolute path, because a root shell has no $STATE_DIRECTORY and
# `lmdaemon backup` must find the database from there. It has the default restart_grace; the shipped file has a short
# one for a first try.
service_config() {
    sed -e "s|^path = \"lmdaemon.sqlite3\"|path = \"$STATE/lmdaemon.sqlite3\"\n                         |" \
        -e '/^restart_grace = /{
            s|"2s" |"60s"|
            s|# default: "60s". After|# After|
        }' \
        -e 's|reconnect and touch first\. 0s: no wait\. Here it is short so that|reconnect and touch first. 0s: no wait|' \
        -e '/^ *# a first try need not wait$/d' config.toml
}

# A configuration that nobody has changed is replaced by this version's. A changed one is kept.
install_config() {
    mkdir -p "$DESTDIR$CONFIG"
    [ -d "$DESTDIR$CONFIG/credentials" ] || install -d -m 700 "$DESTDIR$CONFIG/credentials"
    service_config >"$work/config.toml"
    if [ ! -e "$DESTDIR$CONFIG/config.toml" ]; then
        put 640 "$work/config.toml" "$CONFIG/config.toml"
        give_to_group "$CONFIG/config.toml"
    elif cmp -s "$DESTDIR$CONFIG/config.toml" "$DESTDIR$DOC/config.toml"; then
        cat "$work/config.toml" >"$DESTDIR$CONFIG/config.toml" # not by a rename, which would change owner and mode
    elif ! cmp -s "$work/config.toml" "$DESTDIR$CONFIG/config.toml"; then
        say "$CONFIG/config.toml: kept as you have it; this version's is $DOC/config.toml"
    fi
    put_listed 644 "$work/config.toml" "$DOC/config.toml"
}

give_to_group() { ! is_real || ! getent group lmdaemon >/dev/null || chgrp --no-dereference lmdaemon "$1"; }

make_user() {
    is_real || return 0
    command -v systemd-sysusers >/dev/null || die "needs systemd: there is no systemd-sysusers to make the user lmdaemon"
    systemd-sysusers lmdaemon.conf
}

# remove_files LIST: removes the files in the list, then their compiled files, then directories that are empty.
remove_files() {
    while read -r file; do rm -f "$DESTDIR$file"; done <"$1"
    [ -d "$HERE" ] || return 0
    find "$HERE" -type d -name __pycache__ | while read -r cache; do
        [ -n "$(find "${cache%/*}" -maxdepth 1 -name '*.py')" ] || rm -rf "$cache"
    done
    find "$HERE" -mindepth 1 -depth -type d -empty -delete
}

remove_stale() {
    sort "$work/list" -o "$work/list"
    if [ -e "$DESTDIR$LIST" ]; then
        sort "$DESTDIR$LIST" | comm -13 "$work/list" - >"$work/stale"
        remove_files "$work/stale"
    fi
    put 644 "$work/list" "$LIST"
}

warn_of_shadows() {
    for unit in lmdaemon.service lmdaemon.socket; do
        [ ! -f "$DESTDIR/etc/systemd/system/$unit" ] ||
            say "/etc/systemd/system/$unit: hides the unit just installed; remove it, and keep changes in a drop-in (systemctl edit)"
    done
}

do_install() {
    check_target
    check_room
    check_python
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    build_venv
    build_manual
    list "$LIST"
    install_venv
    install_units
    make_user
    install_docs
    install_manual
    install_command
    install_config
    remove_stale
    warn_of_shadows
    ! has_systemd || systemctl daemon-reload
    is_real || return 0
    if has_systemd && systemctl --quiet is-active lmdaemon.service; then
        say "Installed. The running daemon is still the version before: systemctl try-restart lmdaemon"
    else
        say "Installed. Settings: $CONFIG/config.toml, with a demonstration operator. Start: systemctl enable --now lmdaemon"
    fi
}

do_uninstall() {
    check_target
    [ -e "$DESTDIR$LIST" ] || die "PREFIX: there is no $DESTDIR$LIST, so nothing is known to be installed there"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    cp "$DESTDIR$LIST" "$work/list"
    if has_systemd; then
        sed -n "s|^$UNITS/||p" "$work/list" | xargs -r systemctl --quiet disable --now
    fi
    remove_files "$work/list"
    rmdir "$HERE" 2>/dev/null || say "$PREFIX: kept, for it holds files that were not installed"
    ! has_systemd || systemctl daemon-reload
    say "Uninstalled. Kept: $CONFIG (settings, credentials), $STATE (sessions, deliveries) and the user lmdaemon."
    say "To be rid of them too: rm -r $CONFIG $STATE && userdel lmdaemon"
}

ACTION=${1:-}
case $ACTION in
    install) do_install ;;
    uninstall) do_uninstall ;;
    *) sed -n '2,4p' "$0" >&2 && exit 2 ;;
esac
