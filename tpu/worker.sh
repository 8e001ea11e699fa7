#!/usr/bin/env bash
# One worker of a job: what `python -m tpu.run` asks of each machine, and the supervisor it leaves
# there. Works with bash 3.2 and up, on Linux and macOS; needs the Python that runs the job.
#
#   worker.sh VERB --root=FOLDER [--index=N | --first=N] [options] [-- COMMAND ...]
#
#   unpack     replace FOLDER/source by an archive
#   setup      make FOLDER/venv from constraints.txt, or take --python; print versions
#   launch     start the supervisor of COMMAND in a session of its own
#   status     print what became of it
#   stop       SIGTERM to all processes of the job that was launched here, and to nothing else
#   unlock     remove libtpu's lock where nobody holds the TPU
#   logs       print the log, each line with the worker's number
#
# FOLDER/job/ holds: supervisor, pid (a process's number and when it started), exit (code, time, and
# seconds that the job ran), heartbeat (time, every 2 s), attempt, run, asked, grace, launching (a
# lock), log, log.1 to log.3.
# Each verb but logs prints one line of JSON. Exit code 75 of a job: stopped and saved; 76: diverged.
set -euo pipefail

index='' first=0 root='' archive='' python='' extra='' count='' coordinator='' run='' attempt=1
grace=60 kill=no asked=no lines=100 follow=no log_bytes=10000000
readonly LOCK=/tmp/libtpu_lockfile

fail() {
  printf 'worker %s: %s\n' "${index:-?}" "$*" >&2
  exit 1
}

# Copy standard input to a log that starts anew at so many bytes, at the end of a line unless one is
# longer; three old ones stay. A full disk loses lines, not the job.
ROTATE='
import os, sys
path, limit = sys.argv[1], int(sys.argv[2])
log = open(path, "ab", 0)
while data := os.read(0, 65536):
    try:
        end = data.rfind(b"\n") + 1
        log.write(data[:end])
        if log.tell() > limit and (end or log.tell() > 2 * limit):
            for i in (2, 1, 0):
                old = f"{path}.{i}" if i else path
                if os.path.exists(old):
                    os.replace(old, f"{path}.{i + 1}")
            log.close()
            log = open(path, "ab", 0)
        log.write(data[end:])
    except OSError:
        pass
'

VERSIONS='
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = ""
print(json.dumps({"worker": int(sys.argv[1]), "state": "ready", "versions": found}))
'

# When a process started: a number that was used again is not taken for it. Nothing if it is dead.
birth() {
  local text fields
  if [[ -d /proc/self ]]; then
    text=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -ra fields <<<"${text##*) }"
    if [[ ${fields[0]} != [ZX] ]]; then echo "${fields[19]}"; fi
  else
    text=$(ps -o stat=,lstart= -p "$1" 2>/dev/null) || return 0
    read -ra fields <<<"$text"
    if [[ ${fields[0]} != Z* ]]; then (IFS=_ && echo "${fields[*]:1}"); fi
  fi
}

# alive FILE: whether the process that a file names is still there; sets pid.
alive() {
  local born
  pid=''
  if [[ ! -f $1 ]]; then return 1; fi
  read -r pid born <"$1" || return 1
  [[ -n $born && $(birth "$pid") == "$born" ]]
}

# put FILE WORDS...: replace a file in one go.
put() {
  local file=$1
  shift
  echo "$*" >"$file.new" && mv -f "$file.new" "$file"
}

word() { if [[ -f $1 ]]; then head -n 1 "$1"; fi; }

yes_no() { if test "$@"; then echo true; else echo false; fi; }

find_index() {
  if [[ -z $index ]]; then
    local own=${TPU_WORKER_ID:-}
    local place=computeMetadata/v1/instance/attributes/agent-worker-number
    if [[ -z $own ]]; then
      own=$(curl -sf -m 10 -H 'Metadata-Flavor: Google' \
        "http://${GCE_METADATA_IP:-metadata.google.internal}/$place") ||
        fail 'the metadata of this machine do not say which worker it is'
    fi
    index=$own
  fi
  if [[ ! $index =~ ^[0-9]+$ ]]; then fail "its number must be one, got '$index'"; fi
  index=$((first + index))
}

say() { printf '{"worker": %d, "state": "%s"%s}\n' "$index" "$1" "${2:-}"; }

# Run a command as the leader of a session of its own; `setsid` is not everywhere.
own_session() {
  exec "$python" -I -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "$@"
}

refuse_while_running() {
  if alive "$job/supervisor" || alive "$job/pid"; then
    fail "a job runs here (process $pid); stop it first: python -m tpu.run stop"
  fi
}

unpack() {
  refuse_while_running
  mkdir -p "$root"
  rm -rf "$root/source.new" "$root/source.old"
  mkdir "$root/source.new"
  tar -xzf "$archive" -C "$root/source.new"
  if [[ -d $root/source ]]; then mv "$root/source" "$root/source.old"; fi
  mv "$root/source.new" "$root/source"
  cp "$0" "$root/worker.sh"
  rm -rf "$root/source.old" "$archive" "$0"
  say unpacked
}

setup() {
  local found=''
  refuse_while_running
  if [[ -n $python ]]; then
    put "$root/python" "$python"
  else
    if [[ ! -x $root/venv/bin/python ]]; then
      for found in python3.13 python3.12 python3.11 ''; do
        if [[ -n $found ]] && "$found" -c 'import ensurepip, venv' 2>/dev/null; then break; fi
      done
      if [[ -n $found ]]; then
        "$found" -m venv "$root/venv" >&2
      else # images of TPU VMs bring Python 3.10
        PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv >&2 ||
          fail 'neither Python 3.11 nor uv to be had'
        python3 -m uv venv --seed --python=3.13 "$root/venv" >&2
      fi
    fi
    python=$root/venv/bin/python
    (cd "$root/source" &&
      "$python" -m pip install --quiet --disable-pip-version-check --no-input \
        -c constraints.txt -e ".${extra:+[$extra]}" >&2) ||
      fail 'pip could not install what constraints.txt pins'
    put "$root/python" "$python"
  fi
  "$python" -I -c "$VERSIONS" "$index"
}

read_python() {
  python=$(word "$root/python")
  if [[ -z $python ]]; then fail 'it is not set up; run: python -m tpu.run setup'; fi
}

launch() {
  if [[ ! -d $root/source ]]; then fail 'no source is here; run: python -m tpu.run sync'; fi
  read_python
  mkdir -p "$job"
  # One launch at a time. The lock belongs to the open file: it stays after Python ends, and goes
  # with this shell. `flock` is not everywhere.
  exec 9>>"$job/launching"
  "$python" -I -S -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' ||
    fail "$python does not run here; do: python -m tpu.run setup"
  refuse_while_running
  rm -f "$job/supervisor" "$job/pid" "$job/exit" "$job/heartbeat" "$job/asked" "$job/grace"
  put "$job/attempt" "$attempt"
  put "$job/run" "$run"
  (own_session bash "$0" supervise "--root=$root" "--index=$index" "--run=$run" \
    "--count=$count" "--coordinator=$coordinator" "--attempt=$attempt" \
    "--log-bytes=$log_bytes" -- "$@") </dev/null >>"$job/supervisor.log" 2>&1 9>&- &
  for _ in {1..100}; do
    if [[ -f $job/pid ]]; then break; fi
    sleep 0.1
  done
  if [[ ! -f $job/pid ]]; then
    fail "its supervisor did not start: $(tail -n 1 "$job/supervisor.log")"
  fi
  say launched
}

# Whether a process of a group is alive. A zombie that nobody reaps is not.
group_lives() {
  local stat text fields
  kill -0 -- "-$1" 2>/dev/null || return 1
  if [[ ! -d /proc/self ]]; then return 0; fi
  for stat in /proc/[0-9]*/stat; do
    text=$(cat "$stat" 2>/dev/null) || continue
    read -ra fields <<<"${text##*) }"
    if [[ ${fields[2]} == "$1" && ${fields[0]} != [ZX] ]]; then return 0; fi
  done
  return 1
}

# SIGTERM to a job behind wrappers too. One that only just started leads no group yet.
terminate() {
  kill -TERM -- "-$1" 2>/dev/null || kill -TERM "$1" 2>/dev/null || true
}

supervise() {
  local child='' rotator code=0 told=no looks=0 began ended i
  trap '' HUP INT
  # A machine that shuts down sends SIGTERM to all: the job may save first.
  trap 'told=yes; if [[ -n $child ]]; then terminate "$child"; fi' TERM
  began=$(date +%s)
  read_python
  put "$job/supervisor" "$$ $(birth $$)"
  export JAX_COORDINATOR_ADDRESS=$coordinator JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$index
  export TPU_RUN_ID=$run TPU_RUN_ATTEMPT=$attempt PYTHONUNBUFFERED=1
  export PATH="${python%/*}:$PATH" PYTHONPATH="$root/source${PYTHONPATH:+:$PYTHONPATH}"

  rm -f "$job/pipe"
  mkfifo "$job/pipe"
  "$python" -I -c "$ROTATE" "$job/log" "$log_bytes" <"$job/pipe" &
  rotator=$!
  exec 3>"$job/pipe"
  rm -f "$job/pipe"
  printf -- '--- run %s, attempt %s: %s\n' "$run" "$attempt" "$*" >&3

  (cd "$root/source" && trap - HUP INT && own_session "$@") </dev/null >&3 2>&1 3>&- &
  child=$!
  put "$job/pid" "$child $(birth "$child")"
  if [[ $told == yes ]]; then terminate "$child"; fi
  # Not `wait`: interrupted by a signal just as the job ends, it would lose that end.
  while [[ -n $(birth "$child") ]]; do
    if ((looks++ % 4 == 0)); then put "$job/heartbeat" "$(date +%s)" || true; fi
    sleep 0.5
  done
  ended=$(date +%s)
  trap '' TERM
  wait "$child" && code=0 || code=$?
  # The leader may have been a wrapper, and the program behind it still saves.
  if [[ $told == yes || -f $job/grace ]]; then
    i=$(word "$job/grace")
    for ((i = ${i:-60} * 5; i > 0; i--)); do
      if ! group_lives "$child"; then break; fi
      sleep 0.2
    done
  fi
  kill -KILL -- "-$child" 2>/dev/null || true # what the job had started must not hold the TPU
  printf -- '--- ended with %s\n' "$code" >&3
  exec 3>&-
  for _ in {1..50}; do
    if ! kill -0 "$rotator" 2>/dev/null; then break; fi
    sleep 0.1
  done
  put "$job/exit" "$code $ended $((ended - began))"
  kill "$rotator" 2>/dev/null || true
}

status() {
  local state=none code=null ended=null ran=null beat=null revision='' started=no
  if alive "$job/supervisor"; then # first: it writes `exit` before it goes
    state=running started=yes
    alive "$job/pid" || true
  elif [[ -f $job/exit ]]; then
    state=ended
    if ! read -r code ended ran <"$job/exit"; then # a full disk
      state=lost code=null ended=null
    fi
    ran=${ran:-null}
  elif alive "$job/pid"; then
    state=orphaned started=yes # its supervisor was killed
  elif [[ -f $job/attempt ]]; then
    state=lost
  fi
  if [[ -f $job/heartbeat ]]; then beat=$(($(date +%s) - $(word "$job/heartbeat"))); fi
  if [[ -f $root/source/REVISION.json ]]; then
    revision=$(sed -n 's/.*"revision": "\([0-9a-f]*\)".*/\1/p' "$root/source/REVISION.json")
  fi
  say "$state" ", \"exit\": $code, \"ended\": $ended, \"ran\": $ran, \"beat\": $beat, \
\"pid\": $([[ $started == yes && -n $pid ]] && echo "$pid" || echo null), \
\"attempt\": $(word "$job/attempt" | grep . || echo null), \"run\": \"$(word "$job/run")\", \
\"asked\": $(yes_no -f "$job/asked"), \"ready\": $(yes_no -s "$root/python"), \
\"revision\": \"$revision\""
}

# wait_for_end TENTHS: whether the supervisor and the job ended within that time.
wait_for_end() {
  local i
  for ((i = 0; i < $1; i++)); do
    if ! alive "$job/supervisor" && ! alive "$job/pid"; then return 0; fi
    sleep 0.1
  done
  return 1
}

stop() {
  local leader=''
  if [[ $asked == yes && -d $job ]]; then : >"$job/asked"; fi
  if [[ -d $job ]]; then put "$job/grace" "$grace"; fi
  if alive "$job/pid"; then
    terminate "$pid"
  elif alive "$job/supervisor"; then
    kill -TERM "$pid" 2>/dev/null || true # it knows the job
  fi
  if ! wait_for_end $((grace * 10)) && [[ $kill == yes ]]; then
    if alive "$job/supervisor" && [[ -s $job/pid ]]; then
      read -r leader _ <"$job/pid"
      kill -KILL -- "-$leader" 2>/dev/null || true # its leader may be gone
    fi
    if alive "$job/pid"; then # one that only just started leads no group yet
      kill -KILL -- "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null || true
    fi
    wait_for_end 100 || true
    if alive "$job/supervisor"; then kill -KILL "$pid" 2>/dev/null || true; fi
  fi
  status
}

unlock() {
  refuse_while_running
  if [[ ! -e $LOCK ]]; then
    say unlocked
  elif ! command -v fuser >/dev/null; then
    say kept
  elif fuser "$LOCK" /dev/vfio/* /dev/accel* >/dev/null 2>&1; then
    say held
  elif [[ -O $LOCK ]] && rm -f "$LOCK"; then
    say unlocked
  else
    say kept
  fi
}

logs() {
  local from=() name
  if [[ $follow == yes ]]; then
    tail -n "$lines" -F "$job/log" 2>/dev/null
  elif [[ -f $job/log ]]; then
    for name in log.3 log.2 log.1 log; do
      if [[ -f $job/$name ]]; then from+=("$job/$name"); fi
    done
    cat "${from[@]}" | tail -n "$lines"
  else
    echo 'no log yet'
  fi | while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$index" "$line"
  done
}

main() {
  local verb=${1:-}
  if [[ $# -gt 0 ]]; then shift; fi
  while [[ $# -gt 0 ]]; do
    case $1 in
      --) shift && break ;;
      --root=*) root=${1#*=} ;;
      --index=*) index=${1#*=} ;;
      --first=*) first=${1#*=} ;;
      --archive=*) archive=${1#*=} ;;
      --python=*) python=${1#*=} ;;
      --extra=*) extra=${1#*=} ;;
      --count=*) count=${1#*=} ;;
      --coordinator=*) coordinator=${1#*=} ;;
      --run=*) run=${1#*=} ;;
      --attempt=*) attempt=${1#*=} ;;
      --grace=*) grace=${1#*=} ;;
      --kill) kill=yes ;;
      --asked) asked=yes ;;
      --lines=*) lines=${1#*=} ;;
      --follow) follow=yes ;;
      --log-bytes=*) log_bytes=${1#*=} ;;
      *) fail "unknown option $1" ;;
    esac
    shift
  done
  if [[ -z $root ]]; then fail '--root is missing'; fi
  if [[ $root != /* ]]; then root=$PWD/$root; fi
  job=$root/job pid=''
  find_index
  case $verb in
    unpack | setup | launch | supervise | status | stop | unlock | logs) "$verb" "$@" ;;
    *) fail "unknown verb '$verb'" ;;
  esac
}

main "$@"
