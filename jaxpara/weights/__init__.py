"""What is done with reparameterised weights besides training them; methods are `jp.NAME`."""

from jaxpara.weights.parts import adapters as adapters
from jaxpara.weights.parts import with_adapters as with_adapters
