"""`smartfrz serve --example`: a request that works when it is pasted into a terminal."""

from smartfrz.predictor.contract import (
    CONFIDENCE,
    HISTORY,
    LENGTHS,
    LOSS,
    POSITION,
    POSITIONAL,
    READS_LOSS,
    PredictorInfo,
)

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
  print " \\"data\\": [{records}, {records}]}}{optional}],"
  print " \\"outputs\\": [{{\\"name\\": \\"{confidence}\\"}}]}}"
}}' | curl -sS -H "Content-Type: application/json" --data-binary @- {url}"""
_POSITION = ', {{\\"name\\": \\"{name}\\", \\"datatype\\": \\"FP32\\", \\"shape\\": [2], \\"data\\": [0, 1]}}'
_LOSS = ', {{\\"name\\": \\"{name}\\", \\"datatype\\": \\"FP32\\", \\"shape\\": [2, {records}], \\"data\\": {losses}}}'


def curl_command(info: PredictorInfo, url: str) -> str:
    """Return a command for a POSIX shell with awk and curl that asks a server about two made-up layers.

    The first layer stands still, the second one moves. They have `RECORDS` records each, fewer if the predictor reads
    fewer, and they are the first and the last layer of the network if the predictor reads positions. If it reads the
    training loss, that falls from 2 towards 1.

    Args:
        info: The predictor.
        url: Address of its `infer`.
    """
    records, optional = min(RECORDS, info.window), ""
    if info.representation in POSITIONAL:
        optional += _POSITION.format(name=POSITION)
    if info.representation in READS_LOSS:
        losses = [[round(1 + 1 / record, 3) for record in range(1, records + 1)]] * 2
        optional += _LOSS.format(name=LOSS, records=records, losses=losses)
    return _COMMAND.format(
        history=HISTORY,
        lengths=LENGTHS,
        confidence=CONFIDENCE,
        records=records,
        size=info.tailored_size,
        optional=optional,
        url=url,
    )
