"""`smartfrz serve --example`: a request that works when it is pasted into a terminal."""

from smartfrz.predictor.contract import CONFIDENCE, HISTORY, LENGTHS, POSITION, POSITIONAL, PredictorInfo

RECORDS = 8

# Only what every system has: awk writes the numbers, of which there are too many to paste.
_COMMAND = """\
awk 'BEGIN {{
  printf "{{\\"inputs\\": [{{\\"name\\": \\"{history}\\", \\"datatype\\": \\"FP32\\","
  printf " \\"shape\\": [2, {records}, {size}], \\"data\\": ["
  for (layer = 0; layer < 2; layer++) {{
    for (i = 0; i < {size}; i++) w[i] = rand() - 0.5
    for (record = 0; record < {records}; record++)
      for (i = 0; i < {size}; i++) {{
        if (layer) w[i] += 0.1 * (rand() - 0.5)
        printf "%s%.5f", (layer + record + i ? ", " : ""), w[i]
      }}
  }}
  print "]}}, {{\\"name\\": \\"{lengths}\\", \\"datatype\\": \\"INT64\\", \\"shape\\": [2],"
  print " \\"data\\": [{records}, {records}]}}{position}],"
  print " \\"outputs\\": [{{\\"name\\": \\"{confidence}\\"}}]}}"
}}' | curl -sS -H "Content-Type: application/json" --data-binary @- {url}"""
_POSITION = ', {{\\"name\\": \\"{name}\\", \\"datatype\\": \\"FP32\\", \\"shape\\": [2], \\"data\\": [0, 1]}}'


def curl_command(info: PredictorInfo, url: str) -> str:
    """Return a command for a POSIX shell with awk and curl that asks a server about two made-up layers.

    The first layer stands still, the second one moves. They have `RECORDS` records each, fewer if the predictor reads
    fewer, and they are the first and the last layer of the network if the predictor reads positions.

    Args:
        info: The predictor.
        url: Address of its `infer`.
    """
    return _COMMAND.format(
        history=HISTORY,
        lengths=LENGTHS,
        confidence=CONFIDENCE,
        records=min(RECORDS, info.window),
        size=info.tailored_size,
        position=_POSITION.format(name=POSITION) if info.representation in POSITIONAL else "",
        url=url,
    )
