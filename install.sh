#!/bin/sh
# Puts the toolkit on this machine: a root-owned copy under a prefix, its configuration, and for the embedded batch
# system its hooks. Idempotent: what is current is left alone. See install.sh --help.
set -eu

usage() {
    cat <<'USAGE'
usage: ./install.sh [--prefix DIR] [--config FILE] [--python PROGRAM]

Installs vTorque on this machine as root:
  --prefix DIR      where to (default /opt/vtorque); DIR and all above it must be writable by root alone
  --config FILE     the configuration to start with, where there is none yet (default contrib/vtorque.yaml)
  --python PROGRAM  the Python to run with, 3.9 or newer (default /usr/bin/python3)

Not yet: installing on the nodes of a cluster over pdsh, hooks beside those of the site, and taking it all away again.
For now an administrator copies PREFIX/share/vtorque/mom_priv_hooks/* into each node's mom_priv by hand.
USAGE
}

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

prefix=/opt/vtorque config='' python=/usr/bin/python3
while [ $# -gt 0 ]; do
    case $1 in
    --prefix | --config | --python)
        [ $# -ge 2 ] || die "$1 needs a value; see --help"
        case $1 in
        --prefix) prefix=$2 ;;
        --config) config=$2 ;;
        --python) python=$2 ;;
        esac
        shift 2
        ;;
    --help)
        usage
        exit 0
        ;;
    *) die "unknown option $1; see --help" ;;
    esac
done
[ "$(id -u)" = 0 ] || die "must be run as root: sudo ./install.sh"
case $prefix in
/*[!A-Za-z0-9/._-]* | [!/]*) die "--prefix $prefix: an absolute path of letters, digits, . _ and - is needed" ;;
esac
source=$(cd "$(dirname "$0")" && pwd)
config=${config:-$source/contrib/vtorque.yaml}
[ -r "$config" ] || die "--config $config cannot be read"
umask 022

missing=''
for program in "$python" ssh ssh-keygen qemu-system-x86_64 qemu-img; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -z "$missing" ] || die "missing:$missing; on Debian: apt-get install $(sed 's/#.*//' "$source/contrib/packages.txt" | xargs)"
"$python" -I -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
    die "$python must be 3.9 or newer and have venv; on Debian: apt-get install python3-venv"

# one installation at a time
mkdir -p "$prefix"
exec 9>"$prefix/.lock"
flock 9

parts='setup.cfg pyproject.toml README.md LICENSE vsub vmgr mom_priv_hooks templates contrib man install.sh'
# shellcheck disable=SC2086 # a list of names
stamp=$(cd "$source" && find $parts -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-64)
stamp="$stamp $("$python" -I -c 'import sys; print(sys.version.split()[0])')"
if [ "$(cat "$prefix/.installed" 2>/dev/null)" = "$stamp" ]; then
    current=yes
else
    current=no
    rm -f "$prefix/.installed"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' HUP INT TERM
    # shellcheck disable=SC2086 # a list of names
    (cd "$source" && tar -cf - --exclude=__pycache__ $parts) | tar -xf - -C "$work"
    [ -x "$prefix/venv/bin/python3" ] || "$python" -I -m venv "$prefix/venv"
    "$prefix/venv/bin/python3" -I -m pip install -qq --disable-pip-version-check setuptools wheel
    "$prefix/venv/bin/python3" -I -m pip install -qq --disable-pip-version-check --no-build-isolation \
        --force-reinstall --no-deps "$work"
    "$prefix/venv/bin/python3" -I -m pip install -qq --disable-pip-version-check --no-build-isolation "$work"

    mkdir -p "$prefix/share"
    rm -rf "$prefix/share/vtorque.new"
    mkdir "$prefix/share/vtorque.new"
    for part in templates contrib; do
        cp -R "$work/$part" "$prefix/share/vtorque.new/"
    done
    rm -rf "$prefix/share/vtorque"
    mv "$prefix/share/vtorque.new" "$prefix/share/vtorque"

    packages=$("$prefix/venv/bin/python3" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    launcher() { # launcher PATH MODULE FUNCTION
        mkdir -p "$(dirname "$prefix/$1")"
        printf '#!%s -IS\nimport sys\nsys.path.insert(0, "%s")\nfrom %s import %s as main\nsys.exit(main(sys.argv[1:]))\n' \
            "$prefix/venv/bin/python3" "$packages" "$2" "$3" >"$prefix/$1.new"
        chmod 755 "$prefix/$1.new"
        mv "$prefix/$1.new" "$prefix/$1"
    }
    launcher libexec/vtorque-vsub vsub.start main
    mkdir -p "$prefix/bin"
    sed "s|@PREFIX@|$prefix|g" "$work/contrib/bin/vsub" >"$prefix/bin/vsub.new"
    chmod 755 "$prefix/bin/vsub.new"
    mv "$prefix/bin/vsub.new" "$prefix/bin/vsub"
    launcher bin/vmgr vmgr.cli main
    launcher libexec/vtorque-hook vmgr.node.hook main
    launcher libexec/vtorque-agent vmgr.node.agent main
    launcher libexec/vtorque-user-prologue vmgr.node.barrier main
    launcher libexec/vtorque-job vmgr.node.wrapper main
    launcher libexec/vtorque-batch vsub.batch main
    launcher libexec/vtorque-local vsub.programs local_daemon
    for name in qsub qstat qdel qrerun qhold qrls; do
        launcher "libexec/local/$name" vsub.programs "local_$name"
    done
    # man and the shells find these from the PATH that has $prefix/bin, or are told where: docs/admins.md
    mkdir -p "$prefix/share/man/man1"
    cp "$work"/man/*.1 "$prefix/share/man/man1/"
    completion() { # completion SHELL FILE
        mkdir -p "$(dirname "$prefix/share/$2")"
        "$prefix/bin/vmgr" completion "$1" >"$prefix/share/$2"
    }
    completion bash bash-completion/completions/vmgr
    completion zsh zsh/site-functions/_vmgr_completion
    completion fish fish/vendor_completions.d/vmgr.fish
    mkdir -p "$prefix/etc/vtorque/vm"
    chown -R root:root "$prefix"
    chmod -R go-w "$prefix"
fi

if [ ! -e "$prefix/etc/vtorque/vtorque.yaml" ]; then
    sed "s|@PREFIX@|$prefix|g" "$config" >"$prefix/etc/vtorque/.vtorque.yaml.new"
    chmod 644 "$prefix/etc/vtorque/.vtorque.yaml.new"
    mv "$prefix/etc/vtorque/.vtorque.yaml.new" "$prefix/etc/vtorque/vtorque.yaml"
fi
"$prefix/bin/vmgr" config compile >/dev/null

setting() { "$prefix/bin/vmgr" config show --value "$1"; }

# the hooks, with the places of this installation filled in
spool=$(setting paths.spool)
places="$prefix/share/vtorque/mom_priv_hooks"
[ "$(setting engine)" != local ] || places="$places $(setting local.spool)/mom_priv"
for place in $places; do
    mkdir -p "$place"
    for name in prologue prologue.parallel epilogue epilogue.parallel epilogue.precancel; do
        target=$place/$name new=$place/.$name.new # a user could have $name.new run, by qsub -T new
        sed "s|@PREFIX@|$prefix|g; s|@SPOOL@|$spool|g" "$source/mom_priv_hooks/${name%%.*}" >"$new"
        if cmp -s "$new" "$target"; then
            rm "$new"
        else
            chmod 755 "$new"
            mv "$new" "$target"
        fi
    done
done
# Slurm's, which slurm.conf is to name
place=$prefix/share/vtorque/mom_priv_hooks/slurm
mkdir -p "$place"
for name in prolog epilog task_prolog; do
    sed "s|@PREFIX@|$prefix|g; s|@SPOOL@|$spool|g" \
        "$source/mom_priv_hooks/slurm/$name" >"$place/.$name.new"
    chmod 755 "$place/.$name.new"
    mv "$place/.$name.new" "$place/$name"
done
[ "$current" = yes ] || printf '%s\n' "$stamp" >"$prefix/.installed"
printf 'vTorque is in %s; its configuration is %s\n' "$prefix" "$prefix/etc/vtorque/vtorque.yaml"
