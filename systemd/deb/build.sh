#!/bin/sh
# Makes dist/lmdaemon_VERSION_ARCH.deb of the tree that `make install` puts down, with dpkg-deb alone.
#
# From the environment: PYTHON, which must be Debian's; EXTRAS; SOURCE_DATE_EPOCH, the time that every file gets, so
# that the same sources and wheels give the same bytes (default: the time of the last commit).
set -eu
cd "$(dirname "$0")/../.."
umask 022

PYTHON=${PYTHON:-/usr/bin/python3}
die() { printf 'make deb: %s\n' "$*" >&2; exit 1; }

command -v dpkg-deb >/dev/null || die "needs dpkg-deb: this is for Debian and what is made of it"
python=$("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.executable))') || die "needs Python: apt install python3 python3-venv"
# The package contains no Python. It depends on the Python of the distribution that it is built on.
dpkg-query -S "$python" >/dev/null 2>&1 || die "PYTHON: must be Debian's own, which the package depends on (got $python)"

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' lmdaemon/version.py | sed -E 's/\.?(dev|a|b|rc)/~\1/')-1
arch=$(dpkg --print-architecture)
minor=$("$PYTHON" -c 'import sys; print(sys.version_info[1])')
libc=$(dpkg-query -W -f '${Version}' "libc6:$arch" | sed 's/-.*//')
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
root=$work/root
DESTDIR=$root PREFIX=/opt/lmdaemon BINDIR=/usr/bin PYTHON=$python EXTRAS=${EXTRAS:-} sh systemd/install.sh install
rm "$root/opt/lmdaemon/installed-files" # dpkg keeps its own

put() { mkdir -p "$root/$(dirname "$2")" && install -m 644 "$1" "$root/$2"; }
put systemd/deb/copyright usr/share/doc/lmdaemon/copyright
put systemd/deb/lintian-overrides usr/share/lintian/overrides/lmdaemon
maintainer=$(sed -n 's/^Maintainer: //p' systemd/deb/control)
{
    printf 'lmdaemon (%s) unstable; urgency=medium\n\n  * What changed stands in changelog.gz.\n\n' "$version"
    printf ' -- %s  %s\n' "$maintainer" "$(date -R -u -d "@$SOURCE_DATE_EPOCH")"
} | gzip -9n >"$root/usr/share/doc/lmdaemon/changelog.Debian.gz"
gzip -9nc CHANGELOG.md >"$root/usr/share/doc/lmdaemon/changelog.gz"
chmod 644 "$root"/usr/share/doc/lmdaemon/*

# The socket comes before the service that it starts.
units=$(cd "$root/usr/lib/systemd/system" && ls lmdaemon.socket lmdaemon.service 2>/dev/null | sort -r | xargs)
mkdir "$root/DEBIAN"
size=$(du -k -s --apparent-size --exclude=DEBIAN "$root" | cut -f1)
for file in control conffiles preinst postinst prerm postrm; do
    sed -e "s|@VERSION@|$version|" -e "s|@ARCH@|$arch|" -e "s|@SIZE@|$size|" -e "s|@LIBC@|$libc|" -e "s|@UNITS@|$units|" \
        -e "s|@MINOR@|$minor|" -e "s|@NEXT@|$((minor + 1))|" "systemd/deb/$file" >"$root/DEBIAN/$file"
done
(cd "$root/DEBIAN" && chmod 755 p*)
(cd "$root" && find . -path ./DEBIAN -prune -o -type f ! -path ./etc/lmdaemon/config.toml -printf '%P\0' | LC_ALL=C sort -z |
    xargs -0 md5sum >DEBIAN/md5sums)
find "$root" -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
mkdir -p dist
deb=dist/lmdaemon_${version}_$arch.deb
dpkg-deb --root-owner-group -Zxz --build "$root" "$deb" >/dev/null
echo "$deb"
