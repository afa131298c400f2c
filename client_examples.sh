#!/usr/bin/env bash
# Shell client; it needs curl and jq:
#
#   ./client_examples.sh [URL [PICTURE [NAME=VALUE...]]]
#
# writes output.glb, output.mp4 and preview.png into the current folder. Start the service first: python api.py
# If it asks for a key, set TRELLIS2_API_KEY. NAME=VALUE: seed=7, pipeline_type=1024_cascade, ... as documented.
# Ctrl-C cancels the job.
#
# Exit codes: 0 done, 1 the job failed, 2 the service refused the request, 3 the service is not reached, busy or not
# ready, 4 the job was cancelled, 64 wrong arguments, 130 or 143 interrupted.
set -euo pipefail

url=${1:-http://localhost:8000}
url=${url%/}
picture=${2:-$(dirname "$0")/assets/example_image/T.png}
parameters=("${@:3}")
[ ${#parameters[@]} -gt 0 ] || parameters=(seed=42 pipeline_type=512 texture_size=1024)
poll_seconds=1
quiet_seconds=20 # the event stream says every 15 seconds that it is still there

id=
answer=$(mktemp)
trap 'rm -f "$answer" "$answer.code"; kill $(jobs -p) 2>/dev/null || true' EXIT

fail() { # CODE SENTENCE
    printf 'client_examples.sh: %s\n' "$2" >&2
    exit "$1"
}

interrupted() { # CODE
    trap '' INT TERM
    if [ -n "$id" ]; then
        call --max-time 20 --request POST "$url/api/v1/jobs/$id/cancel" >"$answer" && printf '\nCancelled %s.\n' "$id" >&2
    fi
    exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

# Lost connections, 429 and 503 are tried again; 429 says after how long.
call() {
    curl --silent --show-error --retry 5 --retry-connrefused --retry-max-time 300 --connect-timeout 10 \
        ${TRELLIS2_API_KEY:+--header "Authorization: Bearer $TRELLIS2_API_KEY"} "$@"
}

request() { # CURL ARGUMENT...; leaves the JSON in $answer
    local code
    # In the background, because bash looks at signals only between commands and while it waits.
    call --output "$answer" --write-out '%{http_code}' "$@" >"$answer.code" &
    wait $! || fail 3 "$url does not answer"
    code=$(<"$answer.code")
    case $code in
    2*) ;;
    429 | 502 | 503 | 504) fail 3 "$(sentence)" ;;
    *) fail 2 "$code: $(sentence)" ;;
    esac
}

sentence() { jq --raw-output '.detail // .message' "$answer" 2>/dev/null || printf 'no reason given\n'; }

for tool in curl jq; do
    command -v "$tool" >/dev/null || fail 64 "$tool is not installed"
done
[ -r "$picture" ] || fail 64 "$picture cannot be read"
form=(--form "image=@\"$picture\"" --form wait=false)
for parameter in "${parameters[@]}"; do
    case $parameter in
    *=*) form+=(--form-string "$parameter") ;;
    *) fail 64 "$parameter is not of the form NAME=VALUE" ;;
    esac
done

printf 'Is the service there?\n'
request "$url/health"
jq . "$answer"

printf '\nStart a job and do not wait.\n'
# The key makes it safe to send the request again: the service answers with the same job.
key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
request --request POST --header "Idempotency-Key: $key" "${form[@]}" "$url/api/v1/image-to-3d"
id=$(jq --raw-output .job_id "$answer")
printf '%s\n' "$id"

show() { jq --raw-output '"\(.progress * 100 | floor)% \(.message)"'; }

printf '\nFollow it: one event at every change, until it ends; where the stream breaks, ask.\n'
status=queued
while [ "$status" = queued ] || [ "$status" = running ]; do
    exec 3< <(call --no-buffer --retry 0 --fail "$url/api/v1/jobs/$id/events" 2>/dev/null)
    while IFS= read -r -t "$quiet_seconds" line <&3; do
        case $line in
        data:*) show <<<"${line#data:}" ;;
        esac
    done
    exec 3<&-
    request "$url/api/v1/jobs/$id"
    status=$(jq --raw-output .status "$answer")
    if [ "$status" = queued ] || [ "$status" = running ]; then
        show <"$answer"
        sleep "$poll_seconds"
    fi
done
case $status in
failed) fail 1 "$(jq --raw-output '.error // .message' "$answer")" ;;
cancelled) fail 4 "$(jq --raw-output .message "$answer")" ;;
esac

printf '\nDownload its files.\n'
for path in $(jq --raw-output '.model_url, .video_url, .preview_image_url | values' "$answer"); do
    name=${path##*/}
    call --fail --output "$name.partial" "$url$path" || { rm -f "$name.partial" && fail 3 "$path was not downloaded"; }
    mv "$name.partial" "$name"
    printf '%s\n' "$name"
done

printf '\nDelete them from the service.\n'
request --request DELETE "$url/api/v1/outputs/$id"
jq . "$answer"
