#!/usr/bin/env bash
# Shell examples; they need curl and jq: ./client_examples.sh [URL [PICTURE]]
# Writes output.glb, output.mp4 and preview.png into the current folder. Start the service first: python api.py
# If it asks for a key, set TRELLIS2_API_KEY.
set -euo pipefail

url=${1:-http://localhost:8000}
picture=${2:-$(dirname "$0")/assets/example_image/T.png}
curl=(curl --silent --show-error --fail-with-body)
[ -z "${TRELLIS2_API_KEY:-}" ] || curl+=(--header "Authorization: Bearer $TRELLIS2_API_KEY")

printf 'Is the service there?\n'
"${curl[@]}" "$url/health" | jq .

printf '\nStart a job and do not wait.\n'
job=$("${curl[@]}" --request POST "$url/api/v1/image-to-3d" --header 'Prefer: respond-async' \
    --form "image=@$picture" --form seed=42 --form pipeline_type=512 --form texture_size=1024)
id=$(jq --raw-output .job_id <<<"$job")
printf '%s\n' "$id"

printf '\nFollow it: one event at every change, until it ends.\n'
"${curl[@]}" --no-buffer "$url/api/v1/jobs/$id/events" | sed --quiet --unbuffered 's/^data: //p' |
    jq --raw-output --unbuffered '"\(.progress * 100 | floor)% \(.message)"'

printf '\nDownload its files.\n'
job=$("${curl[@]}" "$url/api/v1/jobs/$id")
if [ "$(jq --raw-output .status <<<"$job")" != completed ]; then
    jq --raw-output '.error // .message' <<<"$job" >&2
    exit 1
fi
for address in model_url video_url preview_image_url; do
    path=$(jq --raw-output ".$address" <<<"$job")
    "${curl[@]}" --output "${path##*/}" "$url$path"
    printf '%s\n' "${path##*/}"
done

printf '\nDelete them from the service.\n'
"${curl[@]}" --request DELETE "$url/api/v1/outputs/$id" | jq .
