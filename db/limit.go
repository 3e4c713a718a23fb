package db

import (
	"context"
	"crypto/sha256"
	"time"
)

// Scope keeps the counts of different endpoints apart.
type Scope string

// Scopes of SpendLimit.
const (
	ScopeRegister Scope = "register"
	ScopeForgot   Scope = "forgot"
	scopeLogin    Scope = "login"
)

// emailKey names what is counted without keeping invented addresses in clear.
// The tenant has a fixed length, the scope no NUL: no two inputs share a key.
func emailKey(scope Scope, tenant TenantID, sent string) []byte {
	b := append([]byte(scope), 0)
	b = append(b, tenant.uuid[:]...)
	sum := sha256.Sum256(append(b, sent...))
	return sum[:]
}

// SpendLimit counts one call of scope for the e-mail as it was sent and tells
// whether it is within limit calls in window. The window opens with its first
// call; refused calls do not lengthen it. Of N concurrent calls over all
// replicas exactly limit are allowed. A limit of 0 allows everything.
func (s *Store) SpendLimit(ctx context.Context, scope Scope, tenant TenantID, sent string, limit int, window time.Duration) (ok bool, retryAfter time.Duration, err error) {
	if limit == 0 {
		return true, 0, nil
	}
	var count int
	var wait float64
	err = s.queryRow(ctx, []any{&count, &wait}, `
INSERT INTO rate_windows AS w (key, window_start, window_count, window_ends)
SELECT $1, t, 1, t + $3::interval FROM clock_timestamp() AS t
    ON CONFLICT (key) DO UPDATE
   SET (window_start, window_count, window_ends) = (
       SELECT CASE WHEN w.window_ends <= t THEN t ELSE w.window_start END,
              CASE WHEN w.window_ends <= t THEN 1 ELSE least(w.window_count, $2) + 1 END,
              CASE WHEN w.window_ends <= t THEN t + $3::interval ELSE w.window_ends END
         FROM clock_timestamp() AS t)
RETURNING window_count, extract(epoch FROM window_ends - clock_timestamp())::float8`,
		emailKey(scope, tenant, sent), limit, window)
	if err != nil {
		return false, 0, err
	}
	return count <= limit, seconds(wait), nil
}
