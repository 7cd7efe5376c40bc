"""`cir serve`: a page over one's own photos, on this machine alone unless told otherwise.

    command      the options of the command, and what it starts
    app          the routes: what the page asks for
    guard        who may ask: host, origin, token, sizes, and the headers of every answer
    questions    a query as the page sends it -> what `Library.search` takes
    pictures     photos and uploads by id, their thumbnails
    turns        one query at a time, a few that wait, the rest is refused
    page/        HTML, CSS and JavaScript, as they are sent

Needs Starlette and uvicorn: pip install 'cir_jax[serve]'.
"""
