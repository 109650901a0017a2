#!/bin/sh
# A served cache with curl alone.  sh examples/curl.sh http://127.0.0.1:8000/v1/caches/digits
# A token, where the service wants one, is taken from the environment: KD_CACHE_TOKEN.
set -eu
cache=${1:?is missing: the URL of a cache, such as http://127.0.0.1:8000/v1/caches/digits}

# From standard input, so that the token is in no process list.
ask() {
  if [ -n "${KD_CACHE_TOKEN:-}" ]; then
    printf 'header = "Authorization: Bearer %s"\n' "$KD_CACHE_TOKEN"
  fi | curl --silent --show-error --fail-with-body --config - "$@"
}

echo "# What it holds."
# Not piped into head, which would hide that curl failed.
held=$(ask "$cache") || { echo "$held"; exit 1; }
printf '%.400s\n' "$held"

echo "# Four recorded positions as JSON, for eyes: up to 64 rows."
ask -H 'Accept: application/json' "$cache/rows?seed=0&start=0&stop=4&arrays=sample,digest"
echo

echo "# Three samples by number."
ask -H 'Accept: application/json' -H 'Content-Type: application/json' \
  -d '{"seed": 0, "samples": [5, 17, 5], "arrays": ["sample", "digest"]}' "$cache/lookup"
echo

echo "# 64 rows as safetensors, with what they are and their checksum."
ask -D - -o rows.safetensors "$cache/rows?seed=0&start=0&stop=64" | grep -i -E '^(HTTP|etag|kd-cache)'

echo "# The same cache is a Zarr group: any Zarr library opens $cache/zarr."
ask -r 0-63 "$cache/zarr/sample/zarr.json"
echo
