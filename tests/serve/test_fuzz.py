"""Requests that schemathesis generates from the API's description, valid and not, to a real server."""

import pytest
import schemathesis
from helpers.collections import color_collection
from helpers.servers import running
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from coalign.serve.api import ENDPOINTS
from coalign.serve.description import describe
from coalign.serve.guard import Access, digest

TOKEN = "correct horse"
EXAMPLES = 25


@pytest.fixture(scope="module")
def url():
    collections = [color_collection(24, lost=(5,)), color_collection(3, seed=1)]
    with running(collections, Access(token=digest(TOKEN))) as port:
        yield f"http://127.0.0.1:{port}"


load_all_checks()
schema = schemathesis.openapi.from_dict(describe(ENDPOINTS, has_token=True))


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_responses_conform_to_the_description(case, url):
    """No 500, no undescribed status, type or content; requests against the schema are refused, and so are those without a token.

    Valid requests may still be refused: their collection, row or tag may not exist.
    """
    response = case.call_and_validate(
        base_url=url,
        headers={"Authorization": f"Bearer {TOKEN}"},
        excluded_checks=[positive_data_acceptance],
        timeout=30,
    )
    assert response.status_code < 500
