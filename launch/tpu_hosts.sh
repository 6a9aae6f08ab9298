#!/usr/bin/env bash
# Sourced by tpu_vm.sh and flow_tpu.sh, with their arguments: reads [--dry-run] TPU_NAME, leaves the job's arguments in $arguments.
#   name, where: the slice, for gcloud (ZONE, PROJECT). run CMD...: runs it, or prints it with --dry-run ($dry).
#   on_every_host EXTRAS CMD: copies this checkout, as committed, to ~/motif_jax of every host, installs it with these extras (PYTHON: by which
#     interpreter of the hosts), and runs CMD there.
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt "${least_arguments:?}" ]; then
  sed -n '2,/^set /{s/^# //p;}' "launch/${0##*/}" >&2
  exit 2
fi
name="$1"
shift
printf -v arguments '%q ' "$@"
export arguments
where=() # ${where[@]+...}: bash before 4.4 takes an empty array for an unset one
[ -z "${ZONE:-}" ] || where+=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_every_host() {
  local install changes
  archive="$(mktemp)"
  trap 'rm -f "$archive"' EXIT
  changes="$(git status --short 2> /dev/null || true)"
  [ -z "$changes" ] || printf '%s\n' "not committed, so not copied:" "$changes" >&2
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name":motif_jax.tar.gz --worker=all ${where[@]+"${where[@]}"}
  # Only the package is made anew: the directory may hold a run by now.
  install="mkdir -p motif_jax && rm -rf motif_jax/motif_jax && tar -xzf motif_jax.tar.gz -C motif_jax && cd motif_jax"
  install="$install && ${PYTHON:+PYTHON=$(printf %q "$PYTHON") }source launch/environment.sh $1"
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all ${where[@]+"${where[@]}"} --command="$install && $2"
}
