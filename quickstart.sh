#!/bin/sh
# From a fresh clone on a bare Debian 12 to a batch job in a virtual machine. Idempotent. See quickstart.sh --help.
set -eu

usage() {
    cat <<'USAGE'
usage: ./quickstart.sh

Installs vTorque in /opt/vtorque with what it needs from Debian and PyPI, builds the guest images micro and debian-12,
starts the embedded batch system, and runs examples/hello.sh in a guest of each image as the user vtdemo, whom it
creates. Run as root. A second run installs and builds nothing again.
USAGE
}

die() {
    printf 'quickstart: %s\n' "$*" >&2
    exit 1
}

case ${1-} in
'') ;;
--help | -h)
    usage
    exit 0
    ;;
*) die "unknown option $1; see ./quickstart.sh --help" ;;
esac
[ "$(id -u)" = 0 ] || die "needs root to install, to add a user and to start guests; run: sudo ./quickstart.sh"

here=$(cd "$(dirname "$0")" && pwd)
prefix=/opt/vtorque
demo=vtdemo
log=/var/log/vtorque/quickstart.log
images='micro debian-12'
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
umask 022
mkdir -p "$(dirname "$log")"
: >"$log"

# step TEXT COMMAND…: runs a command with its output in the log; on a terminal with a moving line, else with plain ones
step() {
    text=$1
    shift
    start=$(date +%s)
    "$@" >>"$log" 2>&1 &
    child=$!
    last=0
    while kill -0 $child 2>/dev/null; do
        passed=$(($(date +%s) - start))
        if [ -t 1 ]; then
            printf '\r\033[K%s … %s s  %.60s' "$text" "$passed" "$(tail -n 1 "$log" | tr -d '\r\033')"
        elif [ $((passed - last)) -ge 20 ]; then
            printf '%s … %s s\n' "$text" "$passed"
            last=$passed
        fi
        sleep 0.2
    done
    if wait $child; then
        [ ! -t 1 ] || printf '\r\033[K'
        printf '%s: done in %s s\n' "$text" $(($(date +%s) - start))
    else
        [ ! -t 1 ] || printf '\n'
        tail -n 15 "$log" >&2
        die "failed: $text; all of its output is in $log"
    fi
}

packages() { sed 's/#.*//' "$here/contrib/packages.txt" | xargs; }

missing_packages() {
    for package in $(packages); do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || printf '%s ' "$package"
    done
}

# megabytes that apt would download for packages
download_size() {
    # shellcheck disable=SC2086 # a list of packages
    apt-get install --print-uris -qq --no-install-recommends $1 2>/dev/null |
        awk '{bytes += $3} END {print int(bytes / 1000000) + 1}'
}

recipe_number() { # recipe_number IMAGE KEY
    sed -n "s/^$2: *\([0-9]*\).*/\1/p" "$here/contrib/images/$1/recipe.yaml"
}

missing=$(missing_packages)
if [ -n "$missing" ]; then
    step 'reading the list of Debian packages' apt-get update -q
fi
download=0 disk=0
[ -z "$missing" ] || download=$(download_size "$missing")
[ -z "$missing" ] || disk=$((download * 4))
[ -x "$prefix/venv/bin/python3" ] || download=$((download + 20)) disk=$((disk + 120))
for image in $images; do
    set -- "/var/lib/vtorque/images/$image"/[0-9]*
    if [ ! -d "$1" ]; then
        download=$((download + $(recipe_number "$image" download_mb)))
        disk=$((disk + $(recipe_number "$image" build_disk_mb)))
    fi
done
printf 'quickstart: downloads about %s MB (Debian and PyPI packages) and needs about %s MB of disk while it builds\n' \
    "$download" "$disk"
free=$(df -Pm /var/lib | awk 'NR == 2 {print $4}')
[ "$free" -ge "$disk" ] || die "$free MB of disk are free in /var/lib, about $disk MB are needed"

# shellcheck disable=SC2086 # a list of packages
[ -z "$missing" ] || step 'installing Debian packages' apt-get install -y -q --no-install-recommends $missing
step "installing vTorque in $prefix" "$here/install.sh" --prefix "$prefix" --config "$here/contrib/quickstart.yaml"
[ "$("$prefix/bin/vmgr" config show --value engine)" = local ] ||
    die "$prefix is set up for a batch system of its own (engine in $prefix/etc/vtorque/vtorque.yaml): use vsub there"
# shellcheck disable=SC2086 # a list of names
step "the images $images" "$prefix/bin/vmgr" image build $images
id "$demo" >/dev/null 2>&1 || step "adding the user $demo" useradd --create-home --shell /bin/bash "$demo"
home=$(getent passwd "$demo" | cut -d: -f6)
for example in "$here"/examples/*.sh; do
    name=${example##*/}
    runuser -u "$demo" -- dd status=none of="$home/$name" <"$example"
done
serving=$(cat /run/vtorque-local.installed 2>/dev/null || :)
if [ "$serving" != "$(cat "$prefix/.installed")" ] || ! "$prefix/libexec/vtorque-local" status >/dev/null 2>&1; then
    "$prefix/libexec/vtorque-local" stop >>"$log" 2>&1 || :
    step 'starting the embedded batch system' "$prefix/libexec/vtorque-local" start
    cp "$prefix/.installed" /run/vtorque-local.installed
fi

# run_job OPTION…: submits hello.sh as the demo user, shows its stages, its timeline and its output
run_job() {
    printf '\n%s@%s:~$ vsub --wait %shello.sh\n' "$demo" "$(hostname)" "${*:+$* }"
    said=$(mktemp)
    status=0
    job=$(cd "$home" && runuser -u "$demo" -- env -i HOME="$home" USER="$demo" LOGNAME="$demo" PATH=/usr/local/bin:/usr/bin:/bin \
        "$prefix/bin/vsub" --wait "$@" hello.sh 2>"$said") || status=$?
    cat "$said"
    seconds=$(sed -n 's/^vsub: timeline: \([0-9.]*\) s from submission to end.*/\1/p' "$said")
    rm -f "$said"
    output=$home/hello.o${job%%.*}
    # the home is the user's: root opens nothing there
    printed=$(runuser -u "$demo" -- cat "$output" 2>/dev/null) || status=1
    if [ "$status" != 0 ]; then
        runuser -u "$demo" -- cat "$home/hello.e${job%%.*}" >&2 2>/dev/null || :
        die "the job ${job:-} ended with status $status; see $log and /var/log/vtorque/node.log"
    fi
    printf '%s (%s):\n' "$output" "$job"
    printf '%s\n' "$printed" | sed 's/^/    /'
    guest=$(printf '%s\n' "$printed" | sed -n 's/^guest: \([^,]*\),.*/\1/p')
}

run_job
run_job -vm img=debian-12

cat <<NEXT

To try next, as the user $demo (su - $demo) with PATH=$prefix/bin:\$PATH:
    vsub --wait -vm vcpus=2,ram=1G hello.sh    a larger guest
    vsub -vm off hello.sh                      the same job on the bare machine
    vmgr ps                                    the guests that run now
    vmgr list                                  the guest images
and ./tests/run in this checkout runs the tests.

quickstart: ok, job $job ran in guest $guest, $seconds s from submission to end
NEXT
