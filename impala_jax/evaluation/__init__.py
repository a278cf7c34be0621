"""Playing games with trained parameters, their scores and videos."""
