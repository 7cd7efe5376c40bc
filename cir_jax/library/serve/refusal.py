"""What is answered to a request that is not served."""

from starlette.responses import JSONResponse


class Refusal(Exception):
    """A status of 4xx or 5xx, and a sentence that says what is wrong and what to do."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status

    def answer(self) -> JSONResponse:
        headers = {"retry-after": "1"} if self.status == 429 else None
        sentence = str(self).encode("utf-8", "replace").decode()  # names of files need not be it
        return JSONResponse({"error": sentence}, self.status, headers)
