# A bare Debian 12 in a directory, as root. Sourced by the tests that need one.

# make_debian_root DIRECTORY [PACKAGE...]
# Debian's minimal variant and the packages. Mirrors, keys and options are those that
# this machine's apt has: they belong to the machine, and are not written down here.
make_debian_root() {
  local root=$1 include=${*:2} mirror
  mirror=$(debian_mirror)
  rm -rf --one-file-system "$root"
  debootstrap --variant=minbase ${include:+--include="${include// /,}"} bookworm "$root" "$mirror" \
    >"$root.log" 2>&1 || { tail -20 "$root.log" >&2; return 1; }
  copy_apt_configuration "$root"
  rm -rf "$root"/var/cache/apt/archives/*.deb
}

# The first mirror of Debian 12 itself among apt's sources.
debian_mirror() {
  apt-get indextargets 'Codename: bookworm' 'Component: main' 'Created-By: Packages' \
    --format '$(REPO_URI)' | head -1
}

# Sources of Debian alone (a third party's would not be a newcomer's), and the options
# and certificates that reach them.
copy_apt_configuration() {
  local root=$1 file
  rm -rf "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/*
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    if [[ -f $file ]] && grep -q bookworm "$file" && grep -q debian-archive-keyring "$file"; then
      install -D -m 0644 "$file" "$root$file"
    elif [[ $file == /etc/apt/sources.list && -f $file ]]; then
      grep -E '^deb .*bookworm' "$file" >"$root$file" || true
    fi
  done
  for file in /etc/apt/apt.conf /etc/apt/apt.conf.d/*; do
    # Hooks and caches of the host's own software are of no use inside.
    if [[ -f $file ]] && grep -qE '^[^/#]*(Acquire|APT::Get)' "$file" && ! grep -qE 'Post-Invoke|IndexTargets' "$file"; then
      install -D -m 0644 "$file" "$root$file"
    fi
  done
  [[ ! -d /etc/ssl/certs ]] || { mkdir -p "$root/etc/ssl/certs" && cp -rL /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" 2>/dev/null || true; }
}
