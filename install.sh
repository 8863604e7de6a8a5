#!/bin/sh
# Installs vTorque on this machine and on the nodes of a cluster, verifies it, brings it up to date and takes it away
# again. What is here finds a Python; the rest is in vmgr/deploy, which needs nothing else. See install.sh --help.
set -eu

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 2
}

python=/usr/bin/python3 previous=''
for word; do
    [ "$previous" != --python ] || python=$word
    case $word in
    --python=*) python=${word#--python=} ;;
    esac
    previous=$word
done
source=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
"$python" -I -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
    die "$python must be Python 3.9 or newer and have venv; on Debian: apt-get install python3-venv"
exec "$python" -IB -c 'import sys
sys.path.insert(0, sys.argv[1])
from vmgr.deploy.main import main
sys.exit(main(sys.argv[1], sys.argv[2:]))' "$source" "$@"
