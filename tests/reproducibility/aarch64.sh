#!/usr/bin/env bash
# The digests on AArch64 by all of fastmb, Python and threads included, under QEMU: Debian's Python for that processor in
# a folder of its own, NumPy's wheel, and the extension as setup.py cross-compiles it. Nothing is installed.
#
#     aarch64.sh PYTHON      # a Python here of the version that Debian has; the source is the checkout this file is in
set -euo pipefail
python=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
tag=cpython-${version/./}-aarch64-linux-gnu

# apt with a state of its own, in which nothing is installed yet: it fetches the packages and all that they need.
mkdir -p "$work"/apt/{lists,cache/archives}/partial "$work/root" "$work/site" "$work/source"
touch "$work/apt/status"
apt() {
    timeout 300 apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root \
        -o Dir::State="$work/apt" -o Dir::State::status="$work/apt/status" -o Dir::Cache="$work/apt/cache" "$@"
}
apt update
apt install --download-only -y --no-install-recommends "python$version-minimal" "libpython$version-stdlib" \
    libgomp1 libstdc++6 > /dev/null
for package in "$work"/apt/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$work/root"
done

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'setuptools>=77' 'cython>=3.1' 'numpy>=2'
"$work/venv/bin/pip" download -q --no-deps --only-binary :all: --python-version "$version" -d "$work" numpy \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64
"$python" -m zipfile -e "$work"/numpy-*.whl "$work/site"

cp -r "$here"/../../{csrc,fastmb,setup.py,pyproject.toml,README.md,LICENSE} "$work/source"
cd "$work/source"
CC=aarch64-linux-gnu-gcc _PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX=.$tag.so \
    "$work/venv/bin/python" setup.py -q build_ext --inplace

cd "$work"
for threads in 1 3; do
    LC_ALL=C PYTHONPATH=$work/source:$work/site PYTHONDONTWRITEBYTECODE=1 \
        qemu-aarch64 -L "$work/root" "$work/root/usr/bin/python$version" "$here/digests.py" --threads "$threads"
done
