package control

import "github.com/headgate-io/headgate/resilience"

// Authority is the side that asks for a hold.
type Authority = resilience.Authority

// The two authorities.
const (
	ByPeople = resilience.ByPeople // operators, by headgate or by hand
	ByAPI    = resilience.ByAPI    // the API's answers, by workers
)
